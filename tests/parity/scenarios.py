"""What both sides of the comparison are given: the settings of each scenario, the adapters, the heads and the prompts.

Imports neither trl nor rlhf_recipes: `trl112.py` reads it in a virtual environment of its own.
"""

import random
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

ROWS, LENGTH, EOS = 8, 8, 2  # of a rollout; of a response; a token
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Options that are called the same and mean the same on both sides.
OPTIONS: dict[str, Any] = {
    "response_length": LENGTH,
    "temperature": 0.7,
    "kl_coef": 0.1,
    "missing_eos_penalty": 1.0,
    "vf_coef": 0.5,
    "num_ppo_epochs": 2,
    "num_mini_batches": 2,
    "optim": "sgd",  # Adam would hide a wrong scale, and make much of rounding where a gradient is almost zero
    "learning_rate": 0.1,
    "max_grad_norm": 0.1,  # TRL 1.12 ignores it
}


@dataclass(frozen=True)
class Scenario:
    """One run of TRL's trainer, which ours repeats."""

    responses: str = "early"  # see trl112.script; "sampled": what TRL samples
    updates: int = 1  # rollouts in all
    prompts: int = 64  # rows of the data set
    options: dict[str, Any] = field(default_factory=dict)  # of both sides, over OPTIONS
    trl: dict[str, Any] = field(default_factory=dict)  # of TRL alone
    pad: str = "<pad>"
    dtype: str = "float32"
    generation: dict[str, Any] = field(default_factory=dict)  # the base model's generation_config.json


ONE_STEP = {"num_ppo_epochs": 1, "num_mini_batches": 1}
ACCUMULATE = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
WARP = {"repetition_penalty": 1.3}

SCENARIOS = {
    "full": Scenario("full", updates=8),
    "early": Scenario("early", updates=8),
    "adamw": Scenario("early", updates=8, options={"optim": "adamw_torch", "learning_rate": 1e-2}),
    "whiten": Scenario(options={**ONE_STEP, "whiten_rewards": True, "kl_estimator": "k3", "gamma": 0.9, "lam": 0.8}),
    "accumulate": Scenario(updates=2, prompts=16, options={"num_mini_batches": 1}, trl=ACCUMULATE),
    "accumulate_mini": Scenario(options={"num_mini_batches": 2}, trl=ACCUMULATE),
    "sampled_pad": Scenario("pad", options=ONE_STEP),
    "pad_is_eos": Scenario("early", pad="<eos>", options=ONE_STEP),
    "no_stop": Scenario("after_eos", options={**ONE_STEP, "missing_eos_penalty": None}, trl={"stop_token": None}),
    "stop_id": Scenario("stop_id", options=ONE_STEP, trl={"stop_token": None, "stop_token_id": 50}),
    "sampled": Scenario("sampled", options=ONE_STEP),
    "sampled_bf16": Scenario("sampled", options=ONE_STEP, dtype="bfloat16"),
    "sampled_warped": Scenario("sampled", options=ONE_STEP, generation=WARP),
}


def prompts(count: int) -> list[list[int]]:
    """Token ids of prompts of 1 to 9 tokens, without special tokens."""
    generator = random.Random(0)
    return [[generator.randrange(4, 64) for _ in range(generator.randint(1, 9))] for _ in range(count)]


def short(name: str) -> str:
    """`layers.0.mlp.up_proj.lora_A` or `score`: what both sides call a parameter once wrappers are cut off."""
    found = re.search(r"layers\.\d+\..*lora_[AB]", name)
    return found.group() if found else "score"


def fill(role: str, parameters: dict[str, nn.Parameter]) -> None:
    """Set the parameters of a role, under their short names, to the same random numbers on both sides."""
    generator = torch.Generator().manual_seed({"policy": 1, "reward": 3, "critic": 4}[role])
    for _, parameter in sorted(parameters.items()):
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone().contiguous()
