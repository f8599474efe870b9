"""A shared base with PPO's roles on a tiny random model, prompts for it, and what its tests read."""

import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from support.tiny_models import make_tokenizer
from torch import Tensor

from rlhf_recipes.data.prepare import Prepared
from rlhf_recipes.model.base import load_base
from rlhf_recipes.model.sampler import Sampler, Samples
from rlhf_recipes.model.shared import SharedBase
from rlhf_recipes.recipe.values import Base, Lora
from rlhf_recipes.stages.options import PPOConfig
from rlhf_recipes.stages.ppo.trainer import PPOTrainer

ROLES = ("policy", "reference", "critic", "reward")
EOS = 2
# A random model rarely says EOS. With these stop tokens besides, about every fourth token ends a response.
STOPS = range(4, 20)
random.seed(0)
PROMPTS = [[random.randrange(4, 64) for _ in range(length)] for length in (1, 6, 3, 2, 9, 4, 1, 5, 3, 7, 2, 4)]
Make = Callable[..., PPOTrainer]


def shared_base(
    folder: Path,
    kind: type[SharedBase] = SharedBase,
    policy_seed: int = 1,
    roles: tuple[str, ...] = ("reference", "policy", "reward", "critic"),
    **base: Any,
) -> SharedBase:
    """The roles with random adapters and heads. The policy equals the reference unless it has another seed."""
    loaded = load_base(Base(str(folder), **({"dtype": "float32"} | base)))
    model = kind(loaded if base else loaded.to("cpu"), Lora(r=4, alpha=8))
    seeds = {"reference": 1, "policy": policy_seed, "reward": 3, "critic": 4}
    for role, seed in ((role, seeds[role]) for role in seeds if role in roles):
        model.add_role(role, trainable=role in ("policy", "critic"), head=role in ("reward", "critic"))
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters_of(role):
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def rows_of(prompts: list[list[int]]) -> list[dict[str, Any]]:
    return [{"prompt_ids": p, "prompt": " ".join(f"w{i}" for i in p), "number": n} for n, p in enumerate(prompts)]


def ppo_config(output_dir: Path, **arguments: Any) -> PPOConfig:
    defaults = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "total_episodes": 4,
        "response_length": 6,
        "temperature": 1.0,
        "learning_rate": 1e-2,
        "num_ppo_epochs": 2,
    }
    return PPOConfig(**(defaults | arguments))


def weights(trainer: PPOTrainer, role: str) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters_of(role)]).clone()


def sampler(model: SharedBase, batch_size: int = 64, tokenizer: Any = None, **changes: Any) -> Sampler:
    settings = {"response_length": 6, "temperature": 1.0, "stop_token_ids": STOPS, "autocast": nullcontext} | changes
    return Sampler(model, tokenizer or make_tokenizer(), batch_size=batch_size, **settings)


class Scripted(SharedBase):
    """Generates the given responses in place of sampled ones."""

    script: Tensor

    def generate(self, input_ids: Tensor, *args: Any) -> Tensor:
        return self.script[: len(input_ids)]


def in_sampling_order(responses: list[list[int]], prompts: list[list[int]]) -> Tensor:
    """The sampler takes prompts of like length together, the shortest first."""
    return torch.tensor(responses)[torch.tensor([len(prompt) for prompt in prompts]).argsort(stable=True)]


def scripted(
    folder: Path, responses: list[list[int]], prompts: list[list[int]] | None = None, **changes: Any
) -> Samples:
    """Samples of the given responses, all of one width."""
    model = shared_base(folder, Scripted)
    assert isinstance(model, Scripted)
    prompts = prompts or PROMPTS[: len(responses)]
    model.script = in_sampling_order(responses, prompts)
    return sampler(model, **changes).sample("policy", prompts)


class Small(SharedBase):
    """Has memory for so many rows at once."""

    room = 2

    def need(self, rows: int) -> None:
        if rows > self.room:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {rows} rows.")

    def generate(self, input_ids: Tensor, *args: Any) -> Tensor:
        self.need(len(input_ids))
        return super().generate(input_ids, *args)

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = super().states(input_ids, attention_mask)
        if states.requires_grad:  # too late in the backward, when some gradients are already there
            states.register_hook(lambda gradient: self.need(len(input_ids)))
        else:
            self.need(len(input_ids))
        return states


def after_one_update(folder: Path, make: Make, options: dict[str, Any]) -> dict[str, Tensor]:
    plain = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "per_device_train_batch_size": 6}
    trainer = make(shared_base(folder, policy_seed=2), **{**plain, "total_episodes": 6, **options})
    trainer.train()
    return {role: weights(trainer, role) for role in ("policy", "critic")}


TEXT_IDS = [[5 + i, *range(20, 26 + 2 * i), EOS] for i in range(6)]
TEXTS = Prepared(*(2 * [Dataset.from_dict({"input_ids": TEXT_IDS})]), False, EOS, {})


def share_of_w7(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    return [c.split().count("w7") / max(1, len(c.split())) for c in completions]


def add_reward_role(model: SharedBase, role: str, seed: int) -> None:
    """One more frozen role with a head, at random."""
    model.add_role(role, head=True)
    for parameter in model.parameters_of(role):
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
