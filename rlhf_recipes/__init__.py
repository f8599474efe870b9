"""RLHF on one GPU: supervised fine-tuning, a reward model and PPO as adapters on one shared base."""

from typing import TYPE_CHECKING, Any

from .recipe import Base, DPOStage, Lora, PPOStage, Recipe, Rounds, Source, Stage, load, replace

if TYPE_CHECKING:
    from .cli import main
    from .config import PPOConfig
    from .model import SharedBase
    from .ppo import PPOTrainer
    from .runner import run

__version__ = "0.1.0"
__all__ = [
    "Base",
    "DPOStage",
    "Lora",
    "PPOConfig",
    "PPOStage",
    "PPOTrainer",
    "Recipe",
    "Rounds",
    "SharedBase",
    "Source",
    "Stage",
    "load",
    "main",
    "replace",
    "run",
]

# Imported on first use: a recipe file must load in milliseconds, and these import torch and trl.
_LAZY = {"main": "cli", "run": "runner", "SharedBase": "model", "PPOConfig": "config", "PPOTrainer": "ppo"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
