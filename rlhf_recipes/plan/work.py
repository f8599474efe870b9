"""What a step of a stage computes: tokens, floating-point operations, forwards."""

import functools
import math
from typing import Any

from ..model.base import base_config
from ..recipe.values import Base, Recipe
from ..stages.configure import training_steps
from ..stages.options import PPOConfig
from ..stages.ppo.roles import Role
from ..stages.reward.adapters import JUDGE
from .dry_run import Shape
from .plan import shape_of
from .skeleton import skeleton


def work_of_step(recipe: Recipe, stage: str, config: Any) -> dict[str, float | None]:
    """Tokens and floating-point operations (FLOP) of a step, and steps, where the recipe alone says how many.

    Where a limit says it, the steps are `at_most` so many, because rows may be dropped, and there may be fewer.
    """
    section = getattr(recipe, stage)
    at_most = config.max_steps <= 0 and getattr(config, "total_episodes", None) is None
    rows = 0 if not at_most else None if section.limit is None else section.limit * (1 - section.heldout)
    steps = None if rows is None else training_steps(stage, config, rows)
    tokens = _rows_of_step(stage, config) * shape_of(recipe, stage, config, on_gpu=False).length
    flop = sum(flop_of_step(recipe, stage, config).values())
    return {"tokens": tokens, "flop": flop, "steps": steps, "at_most": at_most}


def flop_of_step(recipe: Recipe, stage: str, config: Any) -> dict[str, float]:
    """Floating-point operations of each phase of a step.

    A forward takes 2 FLOP a token and weight, a backward to the adapters through frozen weights 2 more, gradient
    checkpointing one more forward of the layers that it is of (Kaplan et al., arXiv:2001.08361, section 2.1, without
    attention). A step of PPO is an update: each row is decoded, scored by the roles, and trained on num_ppo_epochs
    times by policy and critic.
    """
    shape = shape_of(recipe, stage, config, on_gpu=False)
    forward = 2 * _rows_of_step(stage, config) * shape.length * weights_of_token(recipe.base)
    again = 0 if shape.checkpointing == "off" else 1
    if again and shape.checkpointed is not None:
        again = min(1, shape.checkpointed / base_config(recipe.base).get_text_config().num_hidden_layers)
    training = (2 + again) * forward
    if stage != "ppo":
        return {"train": training + (stage == "dpo") * forward}
    trained = config.num_ppo_epochs * sum(role.trained for role in shape.roles)
    return {"generate": forward, "score": len(scoring_roles(config, shape)) * forward, "update": trained * training}


def scoring_roles(config: PPOConfig, shape: Shape) -> list[Role]:
    """The roles that score a rollout by a forward of their own.

    A head alone reads what the policy's forward has computed, and the policy's is that of the update where a single
    micro-batch is the update.
    """
    scoring = [role for role in shape.roles if not role.copy and role.on is None and role.name != JUDGE]
    kept = config.is_one_step and shape.rows >= config.rollout_size
    return [role for role in scoring if role.name != "policy" or (config.scores_policy and not kept)]


def forwards_of_step(recipe: Recipe, stage: str, config: Any) -> dict[str, float]:
    """Forwards of a batch, as many as each phase of a step has. A backward's kernels count as one more."""
    shape = shape_of(recipe, stage, config, on_gpu=False)
    training = 2 if shape.checkpointing == "off" else 3
    if stage != "ppo":
        return {"train": config.gradient_accumulation_steps * (training + (stage == "dpo"))}
    batches, micro = (math.ceil(config.rollout_size / rows) for rows in (shape.more_rows, shape.rows))
    trained = config.num_ppo_epochs * sum(role.trained for role in shape.roles)
    return {
        "generate": batches * config.response_length,
        "score": micro * len(scoring_roles(config, shape)),
        "update": micro * trained * training,
    }


def _rows_of_step(stage: str, config: Any) -> int:
    """Sequences in a step."""
    if stage == "ppo":
        return config.rollout_size
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * (1 if stage == "sft" else 2)


@functools.cache
def weights_of_token(base: Base) -> int:
    """Weights that a token is multiplied with: all but the embeddings, which are looked up."""
    model: Any = skeleton(base)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return sum(p.numel() for p in model.parameters()) - (0 if head is embedding else embedding.numel())
