"""A trainer of PPO over a tiny random model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.ppo import PROMPTS, STOPS, Make, ppo_config, rows_of, shared_base
from support.tiny_models import make_tokenizer, save_model

from rlhf_recipes.model.shared import SharedBase
from rlhf_recipes.stages.ppo.trainer import PPOTrainer


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make(folder: Path, tmp_path: Path) -> Make:
    """Builds a trainer: one update of four prompts unless the arguments say otherwise."""

    def trainer(
        model: SharedBase | None = None, prompts: list[list[int]] = PROMPTS, tokenizer: Any = None, **arguments: Any
    ) -> PPOTrainer:
        names = ("train_dataset", "eval_dataset", "reward_funcs", "gold", "stop_token_ids", "callbacks")
        names += ("ptx",)
        given = {name: arguments.pop(name) for name in names if name in arguments}
        return PPOTrainer(
            model if model is not None else shared_base(folder),
            ppo_config(tmp_path, **arguments),
            processing_class=tokenizer or make_tokenizer(),
            **{"train_dataset": Dataset.from_list(rows_of(prompts)), "stop_token_ids": STOPS, **given},
        )

    return trainer
