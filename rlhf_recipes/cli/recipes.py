"""`rlhf-recipes list` and `rlhf-recipes show`: the recipes, without running one. Both answer at once."""

import argparse
import json

from ..recipe.lookup import load, load_module, recipe_file, recipe_names
from ..recipe.overrides import parse_overrides, replace, settings, to_dict
from ..recipe.values import STAGES
from .command import Command, add_settings, notes_to_stderr


def _list(options: argparse.Namespace) -> None:
    print(recipe_table())


def recipe_table() -> str:
    """One line a recipe: its name, base model, stages, and the first line of its file's docstring."""
    rows = []
    for name in recipe_names():
        module = load_module(recipe_file(name))
        stages = ",".join(stage for stage in STAGES if getattr(module.recipe, stage))
        rows.append((name, module.recipe.base.model, stages, (module.__doc__ or "").strip().partition("\n")[0]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="NAME", help="a shipped recipe, or path/to/your_own.py")
    add_settings(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _show(options: argparse.Namespace) -> None:
    recipe = replace(load(options.recipe), **parse_overrides(options.settings))
    if options.settings:
        # Whether a key of a stage's arguments exists is known only to trl, which takes seconds to import.
        with notes_to_stderr():
            from ..pipeline.variants import checked_variants

            checked_variants(recipe)
    print(json.dumps(to_dict(recipe), indent=2) if options.json else "\n".join(settings(recipe)))


LIST = Command("name the shipped recipes", lambda parser: None, _list)
SHOW = Command("print a recipe, every setting resolved", _show_arguments, _show)
