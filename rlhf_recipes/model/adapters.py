"""Saved adapters: LoRA as PEFT writes it, in safetensors.

Of its other kinds and settings PEFT loads a tokenizer that the folder names, or imports a module: none of them is read.
"""

import re
from pathlib import Path
from typing import Any

import safetensors.torch
from peft import LoraConfig, PeftModel
from torch import Tensor

from ..records.files import read_json

WEIGHTS = "adapter_model.safetensors"

READ = {
    *("task_type", "inference_mode", "base_model_name_or_path", "revision", "modules_to_save"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern"),
}
OF_NO_EFFECT = {"auto_mapping", "peft_version"}


def read_adapter_config(folder: Path) -> LoraConfig:
    """PEFT's configuration of a saved adapter. Raises ValueError where it is more than plain LoRA in safetensors."""
    path, default = folder / "adapter_config.json", LoraConfig().to_dict()
    saved = read_json(path)
    if not isinstance(saved, dict):
        raise ValueError(f"{folder} holds no adapter: there is no {path.name} that PEFT has written.")
    for key in sorted(saved.keys() - READ - OF_NO_EFFECT):
        if saved[key] and saved[key] != default.get(key):
            raise ValueError(f"{path}: {key}={saved[key]!r} is none of a plain LoRA adapter, and no other is loaded.")
    config = LoraConfig(**{key: saved[key] for key in READ & saved.keys()})
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
