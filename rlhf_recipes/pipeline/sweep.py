"""Sweeps: each variant of a recipe in a run folder of its own, and what several need alike trained once.

Importing this room loads no torch: the command line asks it what variants there are.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from ..recipe.overrides import replace, to_dict
from ..recipe.values import STAGES, Recipe
from ..records.files import read_rows, write_json, write_text
from ..records.folder import read_recipe
from ..records.manifest import open_run, read_manifest
from ..records.summary import models_table
from ..report import overoptimization
from ..report.write import write_report
from ..stages.configure import stages_of
from .check import check_recipe
from .one_run import run_one
from .rounds import unfinished_rounds

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import TrainerCallback


# What decides a stage's result, beside the base: stages with the same of it are trained once. DPO ends a recipe.
BUILDS_ON = {
    "sft": ("sft",),
    "reward": ("sft", "reward"),
    "ppo": ("sft", "reward", "ppo", "ptx", "rounds", "gold"),
}

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")  # of a variant: a folder, on every system


def expand(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe of each variant by its name; none for a recipe without variants.

    Raises ValueError, naming the variant, for a name that makes no folder or a change that no recipe takes.
    """
    variants = {}
    for name, changes in recipe.variants.items():
        if not NAME.fullmatch(name) or name in STAGES:
            raise ValueError(
                f"variants: {name!r} names no variant, because its run folder has that name: use letters, digits and "
                f"_ . + -, the first a letter or a digit, and none of {', '.join(STAGES)}."
            )
        if not isinstance(changes, Mapping):
            raise ValueError(f"variants: {name} must be a dict of changes, as {{'ppo': {{'kl_coef': 0.1}}}}.")
        for key in ("name", "variants"):
            if key in changes:
                raise ValueError(f"variants: {name} cannot change {key!r}: leave it out.")
        with _naming(name):
            variants[name] = replace(recipe, **changes, name=f"{recipe.name}-{name}", variants={})
    return variants


def checked_variants(recipe: Recipe) -> list[tuple[Recipe, dict[str, Any]]]:
    """The recipe of each variant, or the recipe itself that has none, with what `check_recipe` returns of it.

    Raises ValueError as that does, naming the variant.
    """

    if not recipe.variants:
        return [(recipe, check_recipe(recipe))]
    found = []
    for name, variant in expand(recipe).items():
        with _naming(name):
            found.append((variant, check_recipe(variant)))
    return found


@contextmanager
def _naming(variant: str) -> Iterator[None]:
    """What is wrong in the block is wrong with the variant."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"variants: {variant}: {error}") from error


def run_sweep(
    recipe: Recipe,
    run_dir: Path,
    stages: Sequence[str] | None,
    force: bool,
    callbacks: "Sequence[TrainerCallback]",
    jobs: int,
) -> dict[str, Any]:
    """Run every variant in a folder inside `run_dir`, and return their summaries as `{"variants": {name: summary}}`.

    Run again, it goes on; variants that were added since run too. Where all variants have held-out curves of reward and
    quality, it also writes what `report.overoptimization` makes of them; `report.html` compares all variants.

    Args:
        jobs: with more than 1 each variant runs in a process of its own, its output in `log.txt` of its folder, and
            the CPU's cores are divided among them.
    Raises:
        ValueError: as `run`, for any of the variants before the first one runs; a variant that failed.
    """
    from rich.console import Console
    from rich.text import Text

    if jobs < 1:
        raise ValueError(f"--jobs must be above 0, not {jobs}.")
    if jobs > 1 and callbacks:
        raise ValueError("callbacks cannot reach the processes that run variants side by side: leave out jobs.")
    checked_variants(recipe)
    sweep = Sweep(expand(recipe), run_dir, stages, force, callbacks, jobs, Console())
    sweep.open()
    write_json(run_dir / "recipe.json", to_dict(recipe))
    if jobs == 1:
        for name in sweep.variants:
            sweep.run_variant(name)
    else:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(sweep.run_variant, sweep.variants))
    found = {name: json.loads((run_dir / name / "summary.json").read_text()) for name in sweep.variants}
    result = {"variants": found}
    write_json(run_dir / "summary.json", result)
    last = {name: list(of["models"].values())[-1] for name, of in found.items() if of["models"]}
    if last:
        sweep.console.print(models_table(last, "variant"))
    written = overoptimization.write_for_sweep(sweep.variants, run_dir)
    also = "" if written is None else f"; reward and quality over KL: {written}"
    page = write_report([run_dir], run_dir / "report.html")
    minutes = sum(sweep.seconds(name) for name in found) / 60
    ending = f"{len(found)} variants, {minutes:.1f} minutes in all{also}. Run folder: {run_dir}; report: {page.name}"
    sweep.console.print(Text(ending))
    return result


@dataclass
class Sweep:
    """The variants of a run, and how they share stages."""

    variants: dict[str, Recipe]
    run_dir: Path
    stages: Sequence[str] | None  # only these; None: all
    force: bool
    callbacks: "Sequence[TrainerCallback]"
    jobs: int
    console: "Console"

    def __post_init__(self) -> None:
        self.locks: defaultdict[str, Lock] = defaultdict(Lock)  # one for each stage that is trained once
        self.alike: defaultdict[str, list[str]] = defaultdict(list)  # the variants that need it
        for name in self.variants:
            for stage in self.wanted(name):
                self.alike[self.key(name, stage)].append(name)

    def wanted(self, name: str) -> list[str]:

        return stages_of(self.variants[name], self.stages)

    def key(self, name: str, stage: str) -> str:
        """Equal for the stages of two variants that come to the same."""
        whole = to_dict(self.variants[name])
        settings = {part: whole[part] for part in ("base", "lora", "seed", *BUILDS_ON.get(stage, ()))}
        only = None if stage in BUILDS_ON and not (stage == "ppo" and whole["rounds"]) else name
        return json.dumps([stage, only, settings])

    def open(self) -> None:
        """Make the variants' run folders. Raises ValueError where one holds another run, before anything is trained."""

        if (self.run_dir / "recipe.json").is_file() and not read_recipe(self.run_dir).variants:
            raise ValueError(f"{self.run_dir} holds a run of a recipe without variants. Set another --run-dir.")
        for name, variant in self.variants.items():
            with _naming(name):
                open_run(variant, self.run_dir / name, self.wanted(name))

    def run_variant(self, name: str) -> None:
        """Train or copy what a variant shares with others, then run the rest of it."""
        for stage in self.wanted(name):
            key = self.key(name, stage)
            if len(self.alike[key]) == 1:
                continue
            with self.locks[key]:
                if self.done(name, stage):
                    continue
                other = next((other for other in self.alike[key] if self.done(other, stage)), None)
                if other is None:
                    self.execute(name, [stage])
                else:
                    copy_stage(stage, self.run_dir / other, self.run_dir / name)
        if not self.finished(name):
            self.execute(name, self.stages)

    def records(self, name: str) -> dict[str, Any]:
        """What the manifest of a variant says of its stages."""

        return read_manifest(self.run_dir / name)["stages"]

    def done(self, name: str, stage: str) -> bool:
        return self.records(name).get(stage, {}).get("state") == "done"

    def finished(self, name: str) -> bool:
        """Whether a variant's summary is of all its stages and rounds."""

        path, wanted = self.run_dir / name / "summary.json", self.wanted(name)
        if not path.is_file() or not all(self.done(name, stage) for stage in wanted):
            return False
        later = unfinished_rounds(self.variants[name], self.run_dir / name) if "ppo" in wanted else []
        return not later and json.loads(path.read_text())["seconds"].keys() >= set(wanted)

    def seconds(self, name: str) -> float:
        """What the stages took that were trained for this variant."""
        return sum(record["seconds"] for record in self.records(name).values() if "copied_from" not in record)

    def execute(self, name: str, stages: Sequence[str] | None) -> None:
        """Run stages of a variant, here or in a process of its own. Raises ValueError where that process fails."""
        from rich.text import Text

        variant, folder = self.variants[name], self.run_dir / name
        left = [stage for stage in stages or self.wanted(name) if not self.done(name, stage)]
        what = f"{name}: {', '.join(left)}"
        if self.jobs == 1:
            self.console.print(Text(what, style="bold"))
            run_one(variant, folder, stages, self.force, self.callbacks)
            return
        order = {"recipe": to_dict(variant), "run_dir": str(folder), "stages": stages, "force": self.force}
        # What is found here (functions of a recipe, the package itself) is found there too.
        path = os.pathsep.join(filter(None, sys.path))
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        command, environment = (
            [sys.executable, "-m", "rlhf_recipes.cli.variant"],
            {"OMP_NUM_THREADS": threads, "PYTHONPATH": path},
        )
        with (
            (folder / "log.txt").open("a") as log,
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=os.environ | environment, text=True
            ) as process,
        ):
            assert process.stdin is not None
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            process.wait()  # its input stays open: see end_with_parent
        if process.returncode:
            words = (folder / "log.txt").read_text().strip().rpartition("\n")[2]
            raise ValueError(f"variants: {what} failed, see {folder}/log.txt: {words}")
        self.console.print(Text(f"{what} done"))


def copy_stage(stage: str, source: Path, target: Path) -> None:
    """Copy a finished stage from one run folder to another: its folder, its rows and, at last, its record.

    Checkpoints stay behind, except those of PPO, which are models to compare.
    """

    shutil.rmtree(target / stage, ignore_errors=True)
    left = shutil.ignore_patterns("checkpoint-*") if stage != "ppo" else None
    shutil.copytree(source / stage, target / stage, ignore=left)
    for name in ("metrics.jsonl", "samples.jsonl"):
        of_stage = [row for row in read_rows(source / name) if _written_by(row, stage)]
        others = [row for row in read_rows(target / name) if not _written_by(row, stage)]
        write_text(target / name, "".join(json.dumps(row) + "\n" for row in [*others, *of_stage]))
    theirs, manifest = read_manifest(source), read_manifest(target)
    manifest["base"] = theirs["base"]
    manifest["stages"][stage] = {**theirs["stages"][stage], "copied_from": source.name}
    write_json(target / "manifest.json", manifest)


def _written_by(row: dict[str, Any], stage: str) -> bool:
    """Whether a stage wrote a row, or an adapter of it that has rows of its own (`reward-1`)."""
    return row["stage"] == stage or row["stage"].startswith(f"{stage}-")
