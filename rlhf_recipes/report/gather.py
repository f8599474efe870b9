"""What a run folder holds, as plain values. A run may be unfinished, or have some of its stages only."""

import json
import math
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..recipe.values import Recipe
from ..records.contents import MetricsRow, RewardCard, Summary
from ..records.files import Row, read_json, read_rows
from ..records.folder import checkpoint_step, checkpoints, newest_round_first, recipe_to_show
from ..records.manifest import Manifest
from ..records.progress import Progress, read_progress
from ..records.recorder import METRICS, SAMPLES, check_rows
from ..records.summary import summarize

SCORES = {"gold": "gold", "judge": "judge", "reward": "score"}  # judge -> the key of its scores in samples and means
TITLES = {"sft": "SFT", "reward": "Reward model", "ppo": "PPO", "dpo": "DPO"}
JUDGES = {
    "gold": "gold",
    "people": "people",
    "judge": "the second reward model",
    "reward": "the reward model that PPO trained against",
}


@dataclass(frozen=True)
class PartContents:
    """What stands in a run's own folder, which is its first round, or in that of a later round."""

    folder: Path
    number: int  # of the round
    manifest: Manifest
    metrics: list[MetricsRow]
    samples: list[Row]

    def label(self, stage: str) -> str:
        """The stage's name, with that of the round from the second on."""
        return stage if self.number == 1 else f"{stage}, round {self.number}"

    @property
    def running(self) -> list[str]:
        """The stages that have begun and are not finished."""
        return [stage for stage in self.manifest.stages if not self.manifest.is_done(stage)]

    def rows(self, stage: str, key: str) -> list[Row]:
        """A stage's logged rows that have a number under the key."""
        return [row for row in self.metrics if row["stage"] == stage and isinstance(row.get(key), int | float)]

    def series(self, stage: str, key: str) -> tuple[list[float], list[float]]:
        """The steps at which a metric was logged, and its values."""
        return self._columns.get((stage, key), ([], []))

    @cached_property
    def _columns(self) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
        """All series, by stage and metric, in one pass: there may be 100,000 rows."""
        columns: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
        for row in self.metrics:
            stage, step = row["stage"], row["step"]
            for key, value in row.items():
                if isinstance(value, int | float):
                    steps, values = columns.setdefault((stage, key), ([], []))
                    steps.append(step)
                    values.append(value)
        return columns

    def last_step(self, stage: str) -> int:
        """The last step of a stage that has a row; 0 where none has."""
        return int(max(self.series(stage, "step")[0], default=0))


@dataclass(frozen=True)
class RunContents:
    """What a run folder holds, with its rounds and its evaluation."""

    name: str  # differs from those of the other runs in a report
    folder: Path
    recipe: Recipe
    parts: list[PartContents]  # the run's own, then a round each
    summary: Summary
    evaluation: dict[str, Any] | None  # what `rlhf-recipes evaluate` wrote
    progress: Progress | None  # of the stage under way, or where it was stopped
    answers: list[Row]  # id, prompt, model, completion, tokens, ended, kl, scores {judge: number}

    @property
    def manifest(self) -> Manifest:
        """The manifest of the run's own folder."""
        return self.parts[0].manifest

    def card(self, part: PartContents) -> RewardCard | None:
        """The reward card of a part."""
        return part.manifest.results("reward").get("card")

    def ppo(self, key: str) -> tuple[list[float], list[float]]:
        """A metric of PPO over the updates of all rounds, with a gap (NaN) where a round begins."""
        x: list[float] = []
        y: list[float] = []
        for part, start in zip(self.parts, self.starts(), strict=True):
            steps, values = part.series("ppo", key)
            if x and steps:
                x.append(start)
                y.append(math.nan)
            x += [start + step for step in steps]
            y += values
        return x, y

    def starts(self) -> list[int]:
        """The update before the first of each part: rounds are counted on."""
        lengths = [part.last_step("ppo") for part in self.parts]
        return [sum(lengths[:number]) for number in range(len(lengths))]

    def quality(self) -> tuple[str, str] | None:
        """PPO's held-out measure of quality, which is not what it trains against: its key and what it is."""
        for key, name in (("eval_gold", "gold"), ("eval_judge", "judge"), ("eval_quality", "quality")):
            if any(part.rows("ppo", key) for part in self.parts):
                return key, name
        return None

    def checkpoints(self) -> list[int]:
        """The updates of which PPO's checkpoint was kept."""
        return [checkpoint_step(path.name) for path in checkpoints(self.folder / "ppo")]


def gather(folders: Sequence[Path], read: Callable[[Path], list[Row]] = read_rows) -> list[RunContents]:
    """Read run folders. That of a sweep stands for those of its variants.

    Args:
        read: what reads the files of rows.

    Raises ValueError for a folder that is no run's, or a file of it that is damaged.
    """
    with_variants = [
        path for folder in folders for path in ([] if _holds_variants(folder) else [folder]) + variants(folder)
    ]
    run_dirs = list(dict.fromkeys(path.resolve() for path in with_variants))
    return [_read_run(run_dir, name, read) for run_dir, name in zip(run_dirs, _names(run_dirs), strict=True)]


@contextmanager
def refusing_strange_values(folders: Sequence[Path]) -> Iterator[None]:
    """A block that reads and shows run folders: what this package does not write there is said, once, as such.

    Each value has been looked at where it is needed, but not by whoever wrote the file.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        if isinstance(error, ValueError) and Path(place.filename).is_relative_to(Path(__file__).parents[1]):
            raise  # it says itself what is wrong
        names = ", ".join(map(str, folders))
        raise ValueError(
            f"{names}: a file there holds what this package does not write ({type(error).__name__}: {error}, in "
            f"{Path(place.filename).name}, line {place.lineno}). If nothing else has written there, please report it."
        ) from error


def variants(folder: Path) -> list[Path]:
    """The run folders inside a run folder that are no rounds of it: the variants of a sweep."""
    inside = sorted(path.parent for path in folder.glob("*/recipe.json"))
    return [path for path in inside if not path.name.startswith("round-")]


def _holds_variants(folder: Path) -> bool:
    """Whether all that a folder has of runs is its variants'."""
    return bool(variants(folder)) and not (folder / "manifest.json").is_file()


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parents as it takes to tell them apart."""
    length = 1
    while True:
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names) or length >= max(len(folder.parts) for folder in folders):
            return names
        length += 1


def _read_run(folder: Path, name: str, read: Callable[[Path], list[Row]]) -> RunContents:
    recipe = recipe_to_show(folder)
    parts = []
    for number, path in enumerate(reversed(newest_round_first(folder)), 1):
        metrics, samples = (check_rows(path / name, read(path / name)) for name in (METRICS, SAMPLES))
        parts.append(PartContents(path, number, Manifest.read(path), metrics, samples))
    summary = summarize(parts[0].manifest, [part.manifest for part in parts[1:] if part.manifest.stages])
    answers = read(folder / "evaluation" / "answers.jsonl") or list(_answers(parts))
    evaluation = read_json(folder / "evaluation" / "evaluation.json")
    progress = read_progress(folder)
    if progress is not None:
        stage, number = progress["stage"].partition("-")[0], progress["round"]
        if not any(stage in part.running and number == part.number for part in parts):
            progress = None
    return RunContents(name, folder, recipe, parts, summary, evaluation, progress, answers)


def _answers(parts: Iterable[PartContents]) -> Iterator[Row]:
    """The answers of the comparison at the end of PPO or DPO, in the form of `evaluation/answers.jsonl`.

    Before it is there, those of PPO's first and last evaluation: what training has made of the same prompts.
    """
    seen: set[tuple[str, str]] = set()
    for part in parts:
        for stage in ("ppo", "dpo"):
            rows = [row for row in part.samples if row["stage"] == stage]
            start = next((index for index, row in enumerate(rows) if row["model"] == "base"), len(rows))
            fresh = set()
            steps = [row["step"] for row in rows] if start == len(rows) else []
            compared = [row for row in rows if row["step"] in (steps[0], steps[-1])] if steps else rows[start:]
            for row in compared:  # the comparison begins with the base
                name = f"{stage}/update-{row['step']}" if steps else row["model"]
                if part.number > 1 and row["model"] == stage:
                    name = f"round-{part.number}/{name}"
                key = (name, json.dumps(row["prompt"]))
                if key not in seen:  # DPO and later rounds sample base and SFT model anew
                    fresh.add(key)
                    yield _answer(row, name)
            seen |= fresh


def _answer(row: Row, name: str) -> Row:
    scores = {judge: row[key] for judge, key in SCORES.items() if key in row}
    kept = {key: row[key] for key in ("prompt", "completion", "ended", "kl") if key in row}
    return {**kept, "model": name, "tokens": row["response_length"], "scores": scores}


def title_of(model: str) -> str:
    """A model's name as the page says it: `runs/other:ppo/checkpoint-40` is runs/other:PPO/checkpoint-40."""
    folder, colon, name = model.rpartition(":")
    return folder + colon + "/".join(TITLES.get(part, part) for part in name.split("/"))


def by_judge(judge: str) -> str:
    """A judge as the page names it after "judged by"."""
    return JUDGES.get(judge, judge)


def win_rates(run: RunContents) -> list[Row]:
    """Win rates as in `evaluation.json`, from there or else from the summary, the most trusted judge first."""
    if run.evaluation is not None:
        rates = run.evaluation.get("wins", [])
    else:
        judges = {"win_rate_vs_sft": "gold", "judge_win_rate_vs_sft": "judge", "reward_win_rate_vs_sft": "reward"}
        rates = [
            {"model": _named(name), "against": "sft", "judge": judge, **means[key]}
            for name, means in run.summary["models"].items()
            for key, judge in judges.items()
            if key in means
        ]
    return sorted(rates, key=lambda row: trust(row["judge"]))


def model_results(run: RunContents) -> dict[str, dict[str, Any]]:
    """Each model's means, behaviour, perplexity and tasks as in `evaluation.json`, from there or from the summary."""
    if run.evaluation is not None:
        return run.evaluation.get("models", {})
    results = {}
    for name, summary in run.summary["models"].items():
        means = {judge: summary[key] for judge, key in SCORES.items() if key in summary}
        behaviour = {"tokens": summary["response_length"], "without_eos": summary["without_eos"], "kl": summary["kl"]}
        results[_named(name)] = {"means": means, "behaviour": behaviour}
        if "perplexity" in summary:
            results[_named(name)]["perplexity"] = summary["perplexity"]
    return results


def _named(name: str) -> str:
    """`ppo_2` of the summary by its name in the run folder, `round-2/ppo`."""
    stage, _, number = name.partition("_")
    return f"round-{number}/{stage}" if number else name


def trust(judge: str) -> int:
    """The rank of a judge: gold, people, then any that PPO was not trained against, then the reward."""
    return {"gold": 0, "people": 1, "judge": 2, "reward": 4}.get(judge, 3)


def best_win(run: RunContents) -> Row | None:
    """The win rate that says most of a run: of its last or best model, against SFT, by the most trusted judge.

    That of the model to ship is of the prompts that did not choose it.
    """
    best = (run.evaluation or {}).get("best") or {}
    candidates = [row for row in win_rates(run) if row["model"] not in ("base", "sft")]
    against = [row for row in candidates if row["against"] == "sft"] or candidates
    against = [row for row in against if row["model"] == best.get("model")] or against
    if not against:
        return None
    if best.get("win", {}).get("against") == against[0]["against"]:
        return best["win"]
    first = [row for row in against if trust(row["judge"]) == trust(against[0]["judge"])]
    return first[-1]


def prompts_of(answers: Iterable[Row]) -> Iterator[tuple[tuple[str, int], Row]]:
    """Each answer with its prompt's identity: the text and, of a model that was asked it several times, which time."""
    times = Counter[tuple[str, str]]()
    for row in answers:
        text = json.dumps(row["prompt"])
        times[row["model"], text] += 1
        yield (text, times[row["model"], text]), row
