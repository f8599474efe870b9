"""Completion in the shell, by argcomplete: beside commands and options, recipes and the keys of settings."""

import argparse
import re
from collections import defaultdict

from ..recipe.lookup import load, recipe_names, recipes_folder
from ..recipe.overrides import settings
from ..recipe.values import STAGES

SHELL = """To complete commands, recipes and settings with Tab in bash and zsh, put into ~/.bashrc or ~/.zshrc:
  eval "$(register-python-argcomplete rlhf-recipes)\""""


def recipes(prefix: str, **_: object) -> list[str]:
    """Shipped recipes, or the files that the shell would offer."""
    from argcomplete.completers import FilesCompleter  # recipes, which import this room, need nothing installed

    return [name for name in recipe_names() if name.startswith(prefix)] or list(FilesCompleter([".py"])(prefix))


def settings_keys(parsed_args: argparse.Namespace, **_: object) -> list[str]:
    """The keys `section.option=` of the page of options and of the recipe that is named, if any.

    The page is read in place of the code, which would import trl.
    """
    listed = defaultdict[str, list[str]](list)  # section -> its options
    section = ""
    for line in (recipes_folder() / "OPTIONS.md").read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"## `?([\w ]+)", line):
            section = heading[1]
        elif option := re.match(r"\| `(\w+)` \|", line):
            listed[section].append(option[1])
    keys = {f"{name}=" for name in listed.pop("The recipe itself")}
    of_data = listed.pop("Data")
    for stage in (*STAGES, "ptx"):
        listed[stage] += of_data
    keys |= {f"{name}.{option}=" for name, options in listed.items() for option in options}
    if getattr(parsed_args, "recipe", None) in recipe_names():
        keys |= {f"{line.partition('=')[0]}=" for line in settings(load(parsed_args.recipe))}
    return sorted(keys)
