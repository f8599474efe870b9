"""How far a run is, and how long it still takes: `progress.json`, which the run writes and whoever looks on reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

from .files import read_json

PROGRESS = "progress.json"

Seconds = tuple[float, float]  # the least and the most


class Later(NamedTuple):
    """What a run does after the stage under way."""

    name: str
    seconds: Seconds | None  # as such a stage took before, or by the plan; None where nothing is known of it


class Progress(TypedDict):
    """`progress.json` of a run's own folder, as of the last time that the stage under way logged something."""

    stage: str  # or a further adapter of it, as `reward-1`
    round: int
    step: int  # that are done
    steps: int
    seconds: Seconds | None  # that are left of the run, as far as they are known; None before the first step
    then: list[str]  # what follows and is not in them


def seconds_left(of_stage: float, later: Sequence[Later]) -> Seconds:
    """What is left of a run, as far as that is known.

    Args:
        of_stage: seconds that the stage under way still takes.
        later: what follows it.
    """
    known = [(of_stage, of_stage), *(part.seconds for part in later if part.seconds is not None)]
    return sum(least for least, _ in known), sum(most for _, most in known)


def read_progress(run_dir: Path) -> Progress | None:
    """How far a run was; None where it has not said so. Raises ValueError where the file is damaged."""
    found = read_json(run_dir / PROGRESS)
    if found is not None and not Progress.__annotations__.keys() <= found.keys():
        raise ValueError(f"{run_dir / PROGRESS} is not what this package writes. Delete it.")
    return found


def stage_words(stage: str, number: int) -> str:
    """A stage with its round, from the second on."""
    return stage if number == 1 else f"{stage} of round {number}"


def left_words(progress: Progress) -> str:
    """What is left in words, as "about 2.5 h left, then reward and ppo"; empty before anything is known."""
    if progress["seconds"] is None:
        return ""
    least, most = map(rough_duration, progress["seconds"])
    left = most if least == most else f"{least} to {most}"
    *names, last = progress["then"] or [""]
    return f"about {left} left" + (f", then {', '.join(names)}{' and ' * bool(names)}{last}" if last else "")


def rough_duration(seconds: float) -> str:
    """An estimate of a duration, in no more digits than it deserves."""
    minutes = seconds / 60
    if minutes < 1:
        return "1 min"
    return (
        f"{minutes:.0f} min"
        if minutes < 99.5
        else f"{minutes / 60:.1f} h"
        if minutes < 600
        else f"{minutes / 60:.0f} h"
    )
