"""Saved adapters: LoRA as PEFT writes it, in safetensors.

Of its other kinds and settings PEFT loads a tokenizer that the folder names, or imports a module: none of them is read.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from peft import LoraConfig, PeftModel, TaskType
from torch import Tensor

from ..records.files import WRITE_AGAIN, read_json

WEIGHTS = "adapter_model.safetensors"


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _are_names(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**20


def _are_layers(value: Any) -> bool:
    layers = value if isinstance(value, list) else [value]
    return value is None or all(type(layer) is int and 0 <= layer < 2**20 for layer in layers)


def _by_pattern(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(fits, value.values())))


READ: dict[str, Callable[[Any], bool]] = {  # the settings that are read, and what PEFT writes of each
    **dict.fromkeys(("base_model_name_or_path", "revision"), _is_text),
    **dict.fromkeys(("use_rslora", "fan_in_fan_out", "inference_mode"), lambda value: isinstance(value, bool)),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"), _are_names),
    "target_parameters": lambda value: _are_names(value) and not isinstance(value, str),
    "layers_to_transform": _are_layers,
    "task_type": lambda value: value in (None, *TaskType),
    "bias": lambda value: value in ("none", "all", "lora_only"),
    "r": _is_rank,
    "lora_alpha": _is_number,
    "lora_dropout": _is_number,
    "rank_pattern": _by_pattern(_is_rank),
    "alpha_pattern": _by_pattern(_is_number),
}
OF_NO_EFFECT = {"auto_mapping", "peft_version"}


def read_adapter_config(folder: Path) -> LoraConfig:
    """PEFT's configuration of a saved adapter. Raises ValueError where it is more than plain LoRA in safetensors."""
    path, default = folder / "adapter_config.json", LoraConfig().to_dict()
    saved = read_json(path)
    if not isinstance(saved, dict):
        raise ValueError(f"{folder} holds no adapter: there is no {path.name} that PEFT has written.")
    for key in sorted(saved.keys() - READ.keys() - OF_NO_EFFECT):
        if saved[key] and saved[key] != default.get(key):
            raise ValueError(f"{path}: {key}={saved[key]!r} is none of a plain LoRA adapter, and no other is loaded.")
    for key in READ.keys() & saved.keys():
        if not READ[key](saved[key]):
            raise ValueError(f"{path}: {key}={str(saved[key])[:100]!r} is not what PEFT writes. {WRITE_AGAIN}")
    try:
        config = LoraConfig(**{key: saved[key] for key in READ.keys() & saved.keys()})
    except ValueError as error:  # of two settings that do not go together
        raise ValueError(f"{path}: {error}") from error
    _leave_patterns_out(config, _weights(folder))
    return config


def _leave_patterns_out(config: LoraConfig, weights: Path) -> None:
    """Have a saved adapter on the modules that its weights are of, and not on those that a pattern in its file matches.

    A pattern may be made so that it is matched without end. Raises ValueError where ranks go by one.
    """
    for key in (*(config.rank_pattern or {}), *(config.alpha_pattern or {})):
        if not re.fullmatch(r"\^?(\.\*)?(\\\.|[\w.])+", key):
            raise ValueError(
                f"{weights.with_name('adapter_config.json')}: the pattern of a rank is none of PEFT's own: {key!r}."
            )
    if isinstance(config.target_modules, str) or isinstance(config.exclude_modules, str) or config.layers_pattern:
        with safetensors.safe_open(weights, "pt") as file:
            names = [key.removeprefix("base_model.model.").partition(".lora_") for key in sorted(file.keys())]
        config.target_modules = {name for name, of_lora, _ in names if of_lora}
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def read_adapter_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a saved adapter by PEFT's names, on the CPU. Raises ValueError where there are none."""
    return safetensors.torch.load_file(_weights(folder))


def load_adapter(model: Any, folder: Path, is_trainable: bool = False) -> PeftModel:
    """PEFT's model of a base with a saved adapter. Raises ValueError as `read_adapter_config` does."""
    return PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable, config=read_adapter_config(folder))


def _weights(folder: Path) -> Path:
    path = folder / WEIGHTS
    if not path.is_file():  # PEFT would read adapter_model.bin, a pickle
        raise ValueError(f"{folder} has no {WEIGHTS}, and an adapter is loaded from no other file.")
    return path
