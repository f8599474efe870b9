"""What a stage writes while it trains: `metrics.jsonl`, `samples.jsonl`, and the tracker's curves."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any

from .contents import Sample
from .files import Row, read_rows, write_text
from .manifest import Manifest
from .tracking import Tracker

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


class Recorder:
    """Appends a stage's rows to the files of its run folder, and hands them to the tracker."""

    def __init__(
        self, run_dir: Path, stage: str, tracker: Tracker, step: int = 0, evaluates: bool = False, writes: bool = True
    ) -> None:
        """
        Args:
            step: the one that the stage goes on from. Rows that an earlier attempt wrote after it are dropped, because
                they come again.
            evaluates: it goes on with that step's evaluation.
            writes: False in a process for which another one writes.
        """
        self.run_dir, self.stage, self.tracker, self.writes = run_dir, stage, tracker, writes
        for name in (METRICS, SAMPLES) if writes else ():
            drop_rows_to_come_again(run_dir / name, stage, step, evaluates)

    def metrics(self, step: int, logs: Mapping[str, Any]) -> None:
        """Record what a trainer logs at a step."""
        self._append(METRICS, [logs], step)
        if "train_runtime" not in logs:  # the totals at the end are no points of a curve
            self.tracker.point(logs, step)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Record held-out prompts with their responses and scores, a row each with its `model`."""
        self._append(SAMPLES, samples, step)
        self.tracker.table("completions", samples, step)

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        if not self.writes:
            return
        with (self.run_dir / name).open("a") as stream:
            stream.writelines(json.dumps({"stage": self.stage, "step": step, **row}) + "\n" for row in rows)


def say_lost_rows(folder: Path) -> None:
    """Say which finished stages of a run or round have no rows any more, as a power cut leaves it. It goes on so."""
    manifest = Manifest.read(folder)
    for name, stages in ((METRICS, tuple(manifest.stages)), (SAMPLES, ("ppo", "dpo"))):
        path = folder / name
        recorded = {row["stage"] for row in check_rows(path, read_rows(path))}
        lost = [stage for stage in stages if manifest.is_done(stage) and stage not in recorded]
        if lost:
            said = f"{path} has no rows of {' and '.join(lost)} any more: the report lacks these curves and answers"
            print(f"warning: {said}. What was trained is whole.", file=sys.stderr)


def check_rows(path: Path, rows: list[Row]) -> list[Row]:
    """The rows of metrics or samples as they are. Raises ValueError where one is none of a stage's."""
    kinds: dict[str, type | UnionType] = {"stage": str, "step": int}
    kinds |= {"model": str, "prompt": str | list, "completion": str} if path.name == SAMPLES else {}
    for number, row in enumerate(rows, 1):
        if wrong := [name for name, kind in kinds.items() if not isinstance(row.get(name), kind)]:
            raise ValueError(f"{path}, row {number}: it has no {wrong[0]}, or a wrong one. Delete this row.")
    return rows


def drop_rows_to_come_again(path: Path, stage: str, step: int, evaluates: bool = False) -> None:
    """Drop a stage's rows that are about to be written again: after the step it resumes from, or after its training.

    Where it `evaluates` first, that step's evaluation comes again too. Raises ValueError for a row that is no stage's.
    """
    if path.is_file():
        kept, again = [], False
        for row in check_rows(path, read_rows(path)):
            # A row of totals ends the training; the comparison of the models after it begins with the base.
            ends = "train_runtime" in row or row.get("model") == "base"
            evaluation = evaluates and row["step"] == step and "eval_loss" in row
            again = again or (row["stage"] == stage and (row["step"] > step or ends or evaluation))
            if row["stage"] != stage or not again:
                kept.append(json.dumps(row) + "\n")
        write_text(path, "".join(kept))
