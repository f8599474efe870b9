"""What a stage has in memory beside the base and its roles: reward models of others, vLLM, a labeler."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..feedback.client import ModelSettings
from ..feedback.connect import local_base
from ..recipe.lookup import is_function
from ..recipe.values import PEOPLE, Base, Recipe
from ..stages.scores import external_base, is_external
from .dry_run import scoring_bytes
from .skeleton import loading_bytes, weight_bytes

AT_ONCE = 8  # rows that an external reward model scores, and questions that a labeler is asked, at one time


@dataclass(frozen=True)
class Others:
    """In bytes."""

    models: float  # reward models of others
    scoring: float  # what scoring with the largest of them takes
    loading: float  # what reading weights takes beside them, of the base or of a reward model
    vllm: float  # vLLM's share of the GPU; 0 where something else samples
    labeler: float  # a model of this machine that labels in rounds, when nothing else is loaded
    labelling: float  # what it takes besides


def other_models(recipe: Recipe, stage: str, config: Any, length: int, gpu: float | None) -> Others:
    """What a stage needs of others: PPO to train on, DPO to compare by PPO's reward.

    Args:
        length: of the stage's longest row, in tokens, by which models with a tokenizer of their own are planned too.
        gpu: bytes of the GPU in all; None: a CPU.
    Raises:
        NoPlan: one of the models cannot be run dry.
    """
    sources = recipe.ppo.reward_sources if recipe.ppo is not None and stage in ("ppo", "dpo") else ()
    external = [external_base(name) for name in sources if is_external(name)]
    loaded = [(recipe.base, False), *((base, True) for base in external if stage == "ppo")]
    by_vllm = gpu is not None and stage == "ppo" and config.generation_backend == "vllm"
    labeler = labeler_base(recipe, gpu) if stage == "ppo" else None
    return Others(
        models=sum(weight_bytes(base, scores=True) for base in external),
        scoring=max((scoring_bytes(base, AT_ONCE, length) for base in external), default=0),
        loading=max(loading_bytes(base, gpu is not None, scores) for base, scores in loaded),
        vllm=config.vllm_gpu_memory_utilization * gpu if by_vllm else 0,
        labeler=0 if labeler is None else weight_bytes(labeler),
        labelling=0
        if labeler is None  # a question holds a prompt and two responses
        else max(scoring_bytes(labeler, AT_ONCE, 2 * length), loading_bytes(labeler, gpu is not None)),
    )


def labeler_base(recipe: Recipe, gpu: float | None) -> Base | None:
    """The model on this machine that labels in rounds, as it is loaded; None where people, a function or a URL do."""
    if recipe.rounds is None or recipe.rounds.labeler == PEOPLE or is_function(recipe.rounds.labeler):
        return None
    base = local_base(ModelSettings(recipe.rounds.labeler))
    return None if base is None else for_gpu(base, gpu)


def for_gpu(base: Base, gpu: float | None) -> Base:
    """A base in the precision that it has on the device that is planned for, whatever this machine is."""
    return base if gpu is None or base.dtype != "auto" else dataclasses.replace(base, dtype="bfloat16")
