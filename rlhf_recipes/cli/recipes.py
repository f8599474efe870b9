"""`rlhf-recipes list` and `rlhf-recipes show`: the recipes, without running one. Both answer at once."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ..recipe.lookup import load, load_module, recipe_file, recipe_names
from ..recipe.overrides import differing_settings, parse_overrides, replace, settings, to_dict
from ..recipe.values import STAGES, Recipe
from ..records.folder import recipe_to_show
from ..records.terminal import printable
from . import completion
from .command import Command, add_settings, complete, notes_to_stderr


def _list(options: argparse.Namespace) -> None:
    print(recipe_table())


def recipe_table() -> str:
    """One line a recipe: its name, base model, stages, and the first line of its file's docstring."""
    rows = []
    for name in recipe_names():
        module = load_module(recipe_file(name))
        stages = ",".join(stage for stage in STAGES if getattr(module.recipe, stage))
        rows.append((name, module.recipe.base.model, stages, (module.__doc__ or "").strip().partition("\n")[0]))
    return aligned(rows)


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    words = "a shipped recipe, path/to/your_own.py, or a run folder"
    complete(parser.add_argument("recipe", metavar="NAME", help=words), completion.recipes)
    add_settings(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--diff", metavar="OTHER", help="print only the settings in which another one differs")


def _show(options: argparse.Namespace) -> None:
    if options.diff is not None and options.json:
        raise ValueError("--diff prints no JSON: leave out --json.")
    recipe = replace(_load(options.recipe), **parse_overrides(options.settings))
    if options.settings:
        # Whether a key of a stage's arguments exists is known only to trl, which takes seconds to import.
        with notes_to_stderr():
            from ..pipeline.variants import checked_variants

            checked_variants(recipe)
    if options.diff is not None:
        differ = differing_settings([recipe, _load(options.diff)])
        rows = [(key, *values) for key, values in differ.items()]
        words = aligned([("", options.recipe, options.diff), *rows]) if rows else "They are the same."
    else:
        words = json.dumps(to_dict(recipe), indent=2) if options.json else "\n".join(settings(recipe))
    print(printable(words, keep="\n"))


def _load(name: str) -> Recipe:
    """A recipe by name or file, or that of a run folder, which is shown and not run."""
    return recipe_to_show(Path(name)) if (Path(name) / "recipe.json").is_file() else load(name)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


LIST = Command("name the shipped recipes", lambda parser: None, _list)
SHOW = Command("print a recipe, every setting resolved", _show_arguments, _show)
