"""RLHF on one GPU: supervised fine-tuning, a reward model and PPO as adapters on one shared base."""

from typing import TYPE_CHECKING, Any

from .model.quiet import quiet_libraries
from .recipe.lookup import load
from .recipe.overrides import replace
from .recipe.values import Base, DPOStage, Lora, PPOStage, Recipe, Rounds, Source, Stage

if TYPE_CHECKING:
    from .cli.run import main
    from .model.processes import join
    from .model.shared import SharedBase
    from .pipeline.run import run
    from .stages.options import PPOConfig
    from .stages.ppo.trainer import PPOTrainer

__version__ = "0.4.0"
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
    "join",
    "load",
    "main",
    "replace",
    "run",
]

# Imported on first use: a recipe file must load in milliseconds, and these import torch and trl.
_LAZY = {
    "main": "cli.run",
    "run": "pipeline.run",
    "join": "model.processes",
    "SharedBase": "model.shared",
    "PPOConfig": "stages.options",
    "PPOTrainer": "stages.ppo.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    quiet_libraries()
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
