"""The recipes of a sweep: each variant's own, made of the recipe and its changes."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ..recipe.overrides import replace, to_dict
from ..recipe.values import STAGES, Recipe
from ..stages.configure import Configs
from .check import check_recipe, check_secrets

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
        with naming_variant(name):
            variants[name] = replace(recipe, **changes, name=f"{recipe.name}-{name}", variants={})
    return variants


def checked_variants(recipe: Recipe) -> list[tuple[Recipe, Configs]]:
    """The recipe of each variant, or the recipe itself that has none, with what `check_recipe` returns of it.

    Raises ValueError as that does, naming the variant.
    """
    if not recipe.variants:
        return [(recipe, check_recipe(recipe))]
    check_secrets(to_dict(recipe))  # what every variant replaces is written too
    checked = []
    for name, variant in expand(recipe).items():
        with naming_variant(name):
            checked.append((variant, check_recipe(variant)))
    return checked


@contextmanager
def naming_variant(name: str) -> Iterator[None]:
    """A block whose ValueErrors are about a variant: they name it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"variants: {name}: {error}") from error
