"""`rlhf-recipes run`, and `main(recipe)`, which a recipe file calls."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..recipe.lookup import load
from ..recipe.overrides import parse_overrides, replace
from ..recipe.values import Recipe
from .command import Command, add_settings, exit_codes, parse_options


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="NAME", help="a shipped recipe, or path/to/your_own.py")
    _run_arguments(parser)


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="the run folder (default: runs/<name>)")
    parser.add_argument("--stages", metavar="sft,reward,ppo,dpo", help="run only these stages")
    parser.add_argument("--force", action="store_true", help="run it even where the plan says that it cannot fit")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="so many variants of a sweep at once (default: 1)"
    )


def _run(options: argparse.Namespace) -> None:
    run_recipe(load(options.recipe), options)


def main(recipe: Recipe, argv: Sequence[str] | None = None) -> None:
    """What a recipe file calls under `if __name__ == "__main__":`, so that `python my.py ppo.kl_coef=0.1` runs it.

    Args:
        recipe: the file's recipe.
        argv: `[key=value ...] [--run-dir DIR] [--stages sft,reward]`; None takes those of the process.
    """
    parser = argparse.ArgumentParser(description=f"Run or resume the recipe {recipe.name}.")
    _run_arguments(parser)
    options = parse_options(parser, argv)
    with exit_codes():
        run_recipe(recipe, options)


def run_recipe(recipe: Recipe, options: argparse.Namespace) -> None:
    """Run a recipe with the changes and options of the command line."""
    stages = tuple(options.stages.split(",")) if options.stages is not None else None
    recipe = replace(recipe, **parse_overrides(options.settings))
    from ..pipeline.run import run

    run(recipe, run_dir=options.run_dir, stages=stages, force=options.force, jobs=options.jobs)


COMMAND = Command("run or resume a recipe", _arguments, _run)
