"""The folder that is shipped: there as a whole or not at all, and what stands in it beside the weights."""

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..model.base import base_config
from ..recipe.values import Base
from ..records.lock import held


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which has its name once the block is done. Whatever ends the block before leaves none.

    What a kill leaves, `.NAME-unfinished` beside it, is taken away by the next one of that name.

    Raises ValueError where there is something by that name, or another process is filling it.
    """
    if path.exists():
        raise ValueError(f"{path} is there already, and is not written over: choose another --to, or delete it.")
    scratch = path.with_name(f".{path.name}-unfinished")
    scratch.mkdir(parents=True, exist_ok=True)
    with held(scratch):
        shutil.rmtree(scratch / "here", ignore_errors=True)
        folder = scratch / "here" / path.name
        folder.mkdir(parents=True)
        try:
            yield folder
            os.replace(folder, path)
        finally:
            shutil.rmtree(scratch)


def check_room(path: Path, base: Base, dtype: torch.dtype, copies: float = 1.0) -> None:
    """Raises ValueError where the disk of `path` has no room for the base's weights in a dtype, so many times."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(base_config(base), trust_remote_code=base.trust_remote_code)
    needed = copies * skeleton.num_parameters() * dtype.itemsize
    there = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ValueError(f"{there} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are to be written.")


def has_foreign_code(made: Any) -> bool:
    """Whether a model or tokenizer is of a class that came with it. Else nobody needs what its `auto_map` names."""
    return type(made).__module__.startswith("transformers_modules.")


def write_config(model: PreTrainedModel, folder: Path, dtype: torch.dtype, **tokens: Any) -> None:
    """Write the configuration of a model whose weights are no longer quantized.

    Args:
        tokens: `eos_token_id` and `pad_token_id`, which a base may have left open or set otherwise.
    """
    config: Any = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if hasattr(config, "auto_map") and not has_foreign_code(model):
        del config.auto_map
    config.architectures, config.dtype = [type(model).__name__], dtype
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        part.update(tokens)
    config.save_pretrained(folder)
