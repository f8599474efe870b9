"""`rlhf-recipes run`, and `main(recipe)`, which a recipe file calls."""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import datetime, time, timedelta
from pathlib import Path

from ..recipe.lookup import load
from ..recipe.overrides import parse_overrides, replace
from ..recipe.values import Recipe
from .command import Command, add_paths, add_recipe, add_settings, exit_codes, parse_options, positive_int
from .launch import launch
from .notify import notifying
from .watch import watched


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    _run_arguments(parser)


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="the run folder (default: runs/<name>)")
    parser.add_argument("--stages", metavar="sft,reward,ppo,dpo", help="run only these stages")
    parser.add_argument("--force", action="store_true", help="run it even where the plan says that it cannot fit")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="so many variants of a sweep at once (default: 1)"
    )
    several = parser.add_mutually_exclusive_group()
    several.add_argument(
        "--processes", type=positive_int, metavar="N", help="share the work among so many, each with a GPU (default: 1)"
    )
    several.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="on a Ray cluster (auto, local, ...): share it among --workers, or place the variants of a sweep",
    )
    parser.add_argument("--workers", type=positive_int, metavar="N", help="of --ray; each is a process with a GPU")
    parser.add_argument("--wait", action="store_true", help="wait for a process that works in the run folder")
    parser.add_argument(
        "--notify",
        metavar="COMMAND",
        help="run a command of the shell when the run has ended, or has logged no step for half an hour and ten times "
        "as long as ever before: with RUN_STATE (done, stopped, failed, stuck), RUN_DIR and RUN_ERROR in its "
        "environment",
    )
    parser.add_argument("--watch", action="store_true", help="open a local page that grows with the run: see `watch`")
    ends = parser.add_mutually_exclusive_group()
    ends.add_argument(
        "--stop-at",
        type=_time,
        metavar="TIME",
        help="stop behind a checkpoint at 07:30, or 2026-03-31T07:30; the same command then goes on",
    )
    ends.add_argument("--max-hours", type=_hours, dest="stop_at", metavar="H", help="stop so after H hours")


def _time(text: str) -> datetime:
    """A day and time, or the next such time of the day."""
    now = datetime.now().astimezone()
    try:
        if "T" in text or " " in text:
            return datetime.fromisoformat(text).astimezone()
        of_day = datetime.combine(now, time.fromisoformat(text)).astimezone()
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither like 07:30 nor like 2026-03-31T07:30") from error
    return of_day if of_day > now else of_day + timedelta(days=1)


def _hours(text: str) -> datetime:
    """So many hours from now."""
    now = datetime.now().astimezone()
    try:
        end = now + timedelta(hours=float(text))
    except (ValueError, OverflowError):  # no number, or one that no calendar holds
        end = now
    if not end > now:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of hours above 0")
    return end


def _run(options: argparse.Namespace) -> None:
    run_recipe(load(options.recipe), options, ["-m", "rlhf_recipes", "run", options.recipe])


def main(recipe: Recipe, argv: Sequence[str] | None = None) -> None:
    """What a recipe file calls under `if __name__ == "__main__":`, so that `python my.py ppo.kl_coef=0.1` runs it.

    Args:
        recipe: the file's recipe.
        argv: `[key=value ...] [--run-dir DIR] [--stages sft,reward]`; None takes those of the process.
    """
    parser = argparse.ArgumentParser(description=f"Run or resume the recipe {recipe.name}.")
    add_paths(parser)
    _run_arguments(parser)
    options = parse_options(parser, argv)
    with exit_codes():
        run_recipe(recipe, options, [sys.argv[0]])


def run_recipe(recipe: Recipe, options: argparse.Namespace, program: Sequence[str]) -> None:
    """Run a recipe with the changes and options of the command line.

    Args:
        program: the words after `python` that run the same recipe, in each of several processes.
    """
    recipe = replace(recipe, **parse_overrides(options.settings))
    if os.environ.get("RANK", "0") != "0":  # of processes that torchrun starts the first watches and tells
        return _run_or_launch(recipe, options, program)
    from ..records.folder import default_run_dir

    run_dir = options.run_dir or default_run_dir(recipe)
    with notifying(options.notify, run_dir), watched(run_dir) if options.watch else nullcontext():
        _run_or_launch(recipe, options, program)


def _run_or_launch(recipe: Recipe, options: argparse.Namespace, program: Sequence[str]) -> None:
    stages = tuple(options.stages.split(",")) if options.stages is not None else None
    if (options.processes or 1) > 1:
        return launch(options.processes, [*program, *_words(options)])
    if options.ray is not None and not recipe.variants:
        from ..records.folder import default_run_dir
        from .ray_workers import launch_on_ray

        if options.workers is None:
            raise ValueError("--ray needs --workers, the number of processes that share the work.")
        run_dir = options.run_dir or default_run_dir(recipe)
        return launch_on_ray(options.ray, options.workers, [*program, *_words(options)], run_dir)
    if options.workers is not None:
        raise ValueError("--workers is of --ray, and the variants of a sweep have one process each: see --jobs.")
    from ..model.processes import join, reported

    with reported():
        join(split=recipe.base.split == "layers")
        from ..pipeline.run import run

        run(
            recipe,
            run_dir=options.run_dir,
            stages=stages,
            force=options.force,
            jobs=options.jobs,
            wait=options.wait,
            stop_at=options.stop_at,
            ray=options.ray,
        )


def _words(options: argparse.Namespace) -> list[str]:
    """The options of the command line again, without those that are for this process alone."""
    given = {"--run-dir": options.run_dir, "--stages": options.stages, "--jobs": options.jobs}
    given["--stop-at"] = None if options.stop_at is None else options.stop_at.isoformat()
    words = [str(word) for option, value in given.items() if value is not None for word in (option, value)]
    flags = [f"--{name}" for name in ("force", "wait") if getattr(options, name)]
    return [*options.settings, *words, *flags]


COMMAND = Command("run or resume a recipe", _arguments, _run)
