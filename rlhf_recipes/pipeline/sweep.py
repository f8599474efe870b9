"""Sweeps: each variant of a recipe in a run folder of its own, and what several need alike trained once."""

import json
import shutil
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from threading import Lock
from typing import TypedDict

from rich.console import Console
from rich.text import Text
from transformers import TrainerCallback

from ..recipe.overrides import to_dict
from ..recipe.values import Recipe
from ..records.contents import Summary
from ..records.files import Row, read_json, read_rows, write_json, write_text, writing_in
from ..records.folder import recipe_to_show, write_recipe
from ..records.lock import Wait, held
from ..records.manifest import Manifest, open_run
from ..records.progress import rough_duration
from ..records.recorder import METRICS, SAMPLES
from ..records.summary import models_table
from ..report import overoptimization
from ..report.write import write_report
from ..stages.configure import stages_of
from ..stages.stop import STOPPED, StopInOrder, Stopped
from .one_run import dated, run_one
from .rounds import unfinished_rounds
from .variants import checked_variants, expand, naming_variant
from .workers import Here, OnRay, Workers

# What decides a stage's result, beside the base: stages with the same of it are trained once. DPO ends a recipe.
BUILDS_ON = {
    "sft": ("sft",),
    "reward": ("sft", "reward"),
    "ppo": ("sft", "reward", "ppo", "ptx", "rounds", "gold"),
}


class SweepSummary(TypedDict):
    """`summary.json` of a sweep."""

    variants: dict[str, Summary]


def run_sweep(
    recipe: Recipe,
    run_dir: Path,
    stages: Sequence[str] | None,
    force: bool,
    callbacks: Sequence[TrainerCallback],
    jobs: int,
    wait: Wait,
    stop: StopInOrder,
    ray: str | None = None,
) -> SweepSummary:
    """Run every variant in a folder inside `run_dir`, and return their summaries as `{"variants": {name: summary}}`.

    Run again, it goes on; variants that were added since run too. Where all variants have held-out curves of reward and
    quality, it also writes what `report.overoptimization` makes of them; `report.html` compares all variants.

    Args:
        jobs: with more than 1 each variant runs in a process of its own, its output in `log.txt` of its folder, on a
            GPU of its own as long as there are enough, and the CPU's cores are divided among them.
        stop: what ends a variant in order.
        ray: the address of a Ray cluster on which the variants run, all at once if there is room and `jobs` is 1.
    Raises:
        ValueError: as `run`, for any of the variants before the first one runs; a variant that failed.
    """
    if jobs < 1:
        raise ValueError(f"--jobs must be above 0, not {jobs}.")
    if (jobs > 1 or ray is not None) and callbacks:
        raise ValueError("callbacks cannot reach the processes that run variants side by side: leave out jobs and ray.")
    checked_variants(recipe)
    if ray is not None and jobs == 1:
        jobs = len(recipe.variants)
    workers = OnRay(ray) if ray is not None else Here(jobs) if jobs > 1 else None
    with writing_in(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    with held(run_dir, wait):
        recipe = dated(recipe, run_dir)  # one day for all, because they share stages
        sweep = Sweep(expand(recipe), run_dir, stages, force, callbacks, jobs, workers, Console(), stop, wait)
        sweep.open()
        write_recipe(run_dir, recipe)
        sweep.run_all()
        return sweep.conclude()


@dataclass
class Sweep:
    """The variants of a run, and how they share stages."""

    variants: dict[str, Recipe]
    run_dir: Path
    stages: Sequence[str] | None  # only these; None: all
    force: bool
    callbacks: Sequence[TrainerCallback]
    jobs: int  # variants that run at one time
    workers: Workers | None  # what runs them; None: this process
    console: Console
    stop: StopInOrder
    wait: Wait  # for a process that works in a variant's folder

    def __post_init__(self) -> None:
        self.locks: defaultdict[str, Lock] = defaultdict(Lock)  # one for each stage that is trained once
        self.alike: defaultdict[str, list[str]] = defaultdict(list)  # the variants that need it
        for name in self.variants:
            for stage in self.wanted(name):
                self.alike[self.key(name, stage)].append(name)

    def wanted(self, name: str) -> list[str]:
        """The stages of a variant that are to run."""
        return stages_of(self.variants[name], self.stages)

    def key(self, name: str, stage: str) -> str:
        """What decides a stage's result, as text: equal for the stages of two variants that come to the same."""
        whole = to_dict(self.variants[name])
        settings = {part: whole[part] for part in ("base", "lora", "seed", *BUILDS_ON.get(stage, ()))}
        only = None if stage in BUILDS_ON and not (stage == "ppo" and whole["rounds"]) else name
        return json.dumps([stage, only, settings])

    def open(self) -> None:
        """Make the variants' run folders. Raises ValueError where one holds another run, before anything is trained."""
        if (self.run_dir / "recipe.json").is_file() and not recipe_to_show(self.run_dir).variants:
            raise ValueError(f"{self.run_dir} holds a run of a recipe without variants. Set another --run-dir.")
        for name, variant in self.variants.items():
            with naming_variant(name):
                open_run(variant, self.run_dir / name, self.wanted(name))

    def run_all(self) -> None:
        """Run every variant. A signal ends those that run in order, and none is begun after it."""
        if self.workers is None:
            for name in self.variants:
                self.run_variant(name)
            return
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                list(pool.map(self.run_variant, self.variants))
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                self.workers.stop()
                raise

    def run_variant(self, name: str) -> None:
        """Train or copy what a variant shares with others, then run the rest of it."""
        for stage in self.wanted(name):
            key = self.key(name, stage)
            if len(self.alike[key]) == 1:
                continue
            with self.locks[key]:
                with held(self.run_dir / name, self.wait):  # another process may be running this variant by itself
                    finished = [alike for alike in self.alike[key] if self.manifest(alike).is_done(stage)]
                    if finished and name not in finished:
                        copy_stage(stage, self.run_dir / finished[0], self.run_dir / name)
                if not finished:
                    self.execute(name, [stage])
        if not self.is_finished(name):
            self.execute(name, self.stages)

    def manifest(self, name: str) -> Manifest:
        """The manifest of a variant's run folder."""
        return Manifest.to_go_on(self.run_dir / name)

    def is_finished(self, name: str) -> bool:
        """Whether a variant's summary is of all its stages and rounds, and its README.md, the last file, is there."""
        folder, wanted = self.run_dir / name, self.wanted(name)
        summary = read_json(folder / "summary.json")
        if (
            summary is None
            or not (folder / "README.md").is_file()
            or not all(self.manifest(name).is_done(stage) for stage in wanted)
        ):
            return False
        later = unfinished_rounds(self.variants[name], self.run_dir / name) if "ppo" in wanted else []
        return not later and summary.get("seconds", {}).keys() >= set(wanted)

    def seconds(self, name: str) -> float:
        """What the stages took that were trained for this variant."""
        records = self.manifest(name).stages.values()
        return sum(record["seconds"] for record in records if "copied_from" not in record)

    def time_left(self) -> str:
        """In brackets how long the stages still take that none has trained yet, as such stages took; "" if unknown."""
        took, left = defaultdict[str, list[float]](list), []
        for key, names in self.alike.items():
            (stage, *_) = json.loads(key)
            records = [found.stages[stage] for found in map(self.manifest, names) if found.is_done(stage)]
            took[stage] += [record["seconds"] for record in records if "copied_from" not in record]
            left += [] if records else [stage]
        if not left or not all(took[stage] for stage in left):
            return ""
        return f" (of the sweep about {rough_duration(sum(fmean(took[stage]) for stage in left) / self.jobs)} left)"

    def execute(self, name: str, stages: Sequence[str] | None) -> None:
        """Run stages of a variant, here or in a process of its own.

        Raises ValueError where that process fails, Stopped where it was stopped.
        """
        manifest = self.manifest(name)
        left = [stage for stage in stages or self.wanted(name) if not manifest.is_done(stage)]
        title = f"{name}: {', '.join(left)}"
        if self.workers is None:
            self.console.print(Text(title + self.time_left(), style="bold"))
            callbacks = (*self.callbacks, self.stop)
            run_one(self.variants[name], self.run_dir / name, stages, self.force, callbacks, self.wait)
            return
        log = self.run_dir / name / "log.txt"
        order = {"recipe": to_dict(self.variants[name]), "run_dir": str(log.parent), "stages": stages}
        order |= {"force": self.force, "stop_at": self.stop.at, "wait": self.wait is not None}
        code = self.workers.run(order, log)
        if code in STOPPED:
            raise Stopped(code)
        if code:
            last_line = log.read_text().strip().rpartition("\n")[2]
            raise ValueError(f"variants: {title} failed, see {log}: {last_line}")
        self.console.print(Text(f"{title} done{self.time_left()}"))

    def conclude(self) -> SweepSummary:
        """Write the summary and the report of all variants, and print the table of what each trained last."""
        summaries = {name: read_json(self.run_dir / name / "summary.json") for name in self.variants}
        result: SweepSummary = {"variants": summaries}
        write_json(self.run_dir / "summary.json", result)
        last = {name: list(summary["models"].values())[-1] for name, summary in summaries.items() if summary["models"]}
        if last:
            self.console.print(models_table(last, "variant"))
        fits = overoptimization.write_for_sweep(self.variants, self.run_dir)
        also = "" if fits is None else f"; reward and quality over KL: {fits}"
        page = write_report([self.run_dir], self.run_dir / "report.html")
        minutes = sum(self.seconds(name) for name in self.variants) / 60
        files = f"Run folder: {self.run_dir}; report: {page.name}"
        self.console.print(Text(f"{len(self.variants)} variants, {minutes:.1f} minutes in all{also}. {files}"))
        return result


def copy_stage(stage: str, source: Path, target: Path) -> None:
    """Copy a finished stage from one run folder to another: its folder, its rows and, at last, its record.

    Checkpoints stay behind, except those of PPO, which are models to compare.
    """
    shutil.rmtree(target / stage, ignore_errors=True)
    left = shutil.ignore_patterns("checkpoint-*") if stage != "ppo" else None
    shutil.copytree(source / stage, target / stage, ignore=left)
    for name in (METRICS, SAMPLES):
        kept = [row for row in read_rows(target / name) if not _is_of_stage(row, stage)]
        copied = [row for row in read_rows(source / name) if _is_of_stage(row, stage)]
        write_text(target / name, "".join(json.dumps(row) + "\n" for row in kept + copied))
    theirs, manifest = Manifest.read(source), Manifest.read(target)
    manifest.base = theirs.base
    manifest.stages[stage] = {**theirs.stages[stage], "copied_from": source.name}
    manifest.write(target)


def _is_of_stage(row: Row, stage: str) -> bool:
    """Whether a stage wrote a row, or an adapter of it that has rows of its own (`reward-1`)."""
    return row["stage"] == stage or row["stage"].startswith(f"{stage}-")
