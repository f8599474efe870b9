"""The models of a run folder as roles on one base."""

from pathlib import Path

from ..recipe.values import Recipe
from .base import fingerprint, load_base, load_tokenizer
from .shared import SharedBase


def open_models(recipe: Recipe, folders: dict[str, Path | None]) -> SharedBase:
    """The base of a recipe with a role for each name; one without a folder is the base, or a base without SFT."""
    tokenizer = load_tokenizer(recipe.base)
    shared = SharedBase(load_base(recipe.base), recipe.lora, fingerprint(recipe.base, tokenizer))
    for name, folder in folders.items():
        if name != "base":
            shared.add_role(name, folder)
    return shared
