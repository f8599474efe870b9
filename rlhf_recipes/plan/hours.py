"""How long a stage takes on a GPU, by the bandwidth of its memory and its matrix rate.

What the estimate rests on is one card, an H200, which decoded, scored and trained Mistral-7B in NF4 (see README.md).
"""

import math
from collections.abc import Mapping
from typing import Any

from ..model.base import base_config
from ..recipe.values import Recipe
from ..stages.configure import Configs, training_steps
from ..stages.options import PPOConfig
from .cards import Card
from .plan import MemoryPlan, for_device, shape_of
from .skeleton import quantized, skeleton, weight_bytes
from .stage_memory import MIB, StagePlan
from .work import flop_of_step, forwards_of_step

# Shares of the data sheet's figures that were reached: 55 and 39 % of the rate of a large product, which itself is 79 %
# of the data sheet's; and a copy, which is 83 % of the bandwidth.
RATE = {"score": 0.55 * 0.79, "train": 0.39 * 0.79}
BANDWIDTH = 0.83
# Of a forward of one layer whose kernels Python issues one by one, whatever they compute: 73 ms a token, 32 layers.
LAYER_SECONDS = 0.073 / 32
SPREAD = 1.5  # to both sides: no second card has been measured
FUSED_ROWS = 8  # of so many rows a product reads a 4-bit weight as it is. Of more it writes and reads it in 16 bits.

Range = tuple[float, float]


def seconds_of_step(recipe: Recipe, stage: str, config: Any, planned: StagePlan, card: Card) -> dict[str, Range]:
    """The least and the most seconds of each phase of a stage's step on a card, for rows of the longest lengths.

    PPO's decoding is between what its bytes allow and what the eager loop took, kernel by kernel. All else is by its
    floating-point operations, or by its kernels where these take longer. Loading and evaluations are left out.
    """
    assert card.tflops is not None and card.gb_per_s is not None
    layers = base_config(recipe.base).get_text_config().num_hidden_layers
    flop, forwards = flop_of_step(recipe, stage, config), forwards_of_step(recipe, stage, config)
    ranges = {}
    for phase in flop.keys() - {"generate"}:
        by_rate = flop[phase] / (card.tflops * 1e12 * RATE["score" if phase == "score" else "train"])
        seconds = max(by_rate, forwards[phase] * layers * LAYER_SECONDS)
        ranges[phase] = seconds / SPREAD, seconds * SPREAD
    if stage == "ppo":
        prompts = flop["generate"] / (card.tflops * 1e12 * RATE["score"])
        least = prompts + decoded_bytes(recipe, config, planned) / (card.gb_per_s * 1e9 * BANDWIDTH)
        most = max(SPREAD * least, prompts + forwards["generate"] * layers * LAYER_SECONDS)
        ranges["generate"] = (most / SPREAD if config.generation_backend == "eager" else least), most
    return {phase: ranges[phase] for phase in flop}


def decoded_bytes(recipe: Recipe, config: PPOConfig, planned: StagePlan) -> float:
    """Bytes that sampling a rollout moves: for each token of a batch the weights, and the keys and values so far."""
    shape, model = shape_of(recipe, "ppo", config, on_gpu=True), skeleton(recipe.base)
    weights = weight_bytes(recipe.base)
    if recipe.base.quantization == "nf4" and shape.more_rows > FUSED_ROWS:
        weights += 4 * sum(module.weight.numel() for module in quantized(model))
    cached = planned.parts["kv_cache"] * MIB * (shape.prompt + config.response_length / 2) / shape.length
    return math.ceil(config.rollout_size / shape.more_rows) * config.response_length * (weights + cached)


def hours(seconds: dict[str, Range], steps: float | None) -> Range | None:
    """The least and the most hours of so many steps; None where it is not known how many they are."""
    if steps is None:
        return None
    least, most = (sum(column) * steps / 3600 for column in zip(*seconds.values(), strict=True))
    return least, most


def seconds_of_stages(
    recipe: Recipe, configs: Configs, plan: MemoryPlan, rows: Mapping[str, int], card: Card | None
) -> dict[str, Range]:
    """The least and the most seconds of each planned stage whose training rows are known, on a card whose rates are.

    Args:
        rows: that each stage trains on.
    """
    found = {}
    for stage in plan.stages.keys() & rows.keys() if card is not None and card.tflops is not None else ():
        assert card is not None
        _, on_gpu, config = for_device(recipe, stage, configs[stage], None)
        seconds = seconds_of_step(on_gpu, stage, config, plan.stages[stage], card)
        taken = hours(seconds, training_steps(stage, config, rows[stage]))
        if taken is not None:
            found[stage] = (3600 * taken[0], 3600 * taken[1])
    return found
