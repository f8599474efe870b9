"""The models of a run folder as roles on one base, and what tells each from others of its name."""

import hashlib
from pathlib import Path
from typing import Any

from ..recipe.values import Base, Recipe
from .adapters import WEIGHTS
from .base import fingerprint, load_base, load_tokenizer
from .shared import BIAS, SharedBase


def open_models(recipe: Recipe, folders: dict[str, Path | None]) -> SharedBase:
    """The base of a recipe with a role for each name; one without a folder is the base, or a base without SFT."""
    tokenizer = load_tokenizer(recipe.base)
    shared = SharedBase(load_base(recipe.base), recipe.lora, fingerprint(recipe.base, tokenizer))
    for name, folder in folders.items():
        if name != "base":
            shared.add_role(name, folder)
    return shared


def model_identity(base: Base, tokenizer: Any, adapter: Path | None = None) -> dict[str, str | None]:
    """What a model's answers depend on, as plain JSON values: its base's fingerprint and its adapter.

    The dtype is left out: it is the machine's, and a file that was begun on one may be gone on with on another.
    """
    known = {key: value for key, value in fingerprint(base, tokenizer).items() if key != "dtype"}
    # All that a fingerprint holds is text or None, but pyright takes the items of a TypedDict for objects.
    return {**known, "adapter": None if adapter is None else adapter_digest(adapter)}  # type: ignore[dict-item]


def adapter_digest(folder: Path) -> str:
    """A hash of a saved adapter: its weights, and the bias of a reward model."""
    found = hashlib.sha256()
    for name in ("adapter_config.json", WEIGHTS, BIAS):
        if (folder / name).is_file():
            found.update((folder / name).read_bytes())
    return found.hexdigest()[:32]
