"""What to change where a plan does not fit: each change with what it buys."""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from ..recipe.overrides import parse_overrides, replace
from ..recipe.values import Recipe
from ..stages.configure import Configs, configure
from .plan import MemoryPlan, for_device, gib, plan_memory, work_of_step


@dataclass(frozen=True)
class Change:
    """Settings, as the command line takes them, and what the stage then takes."""

    settings: str
    peak_mib: float
    saves_mib: float
    same_results: bool

    def __str__(self) -> str:
        same = ", same results" if self.same_results else ""
        return f"{self.settings}: {gib(self.peak_mib)} GiB (-{gib(self.saves_mib)}{same})"


def helpful_changes(recipe: Recipe, stage: str, configs: Configs, gpu: float | None = None) -> list[Change]:
    """Single changes that lower a stage's peak by 1 % or more, those that save most first.

    Args:
        configs: the stages' trainer configurations, as `check_recipe` returns them.
        gpu: bytes of the GPU to plan for; None: this machine.
    """
    before = plan_memory(recipe, configs, gpu, only=[stage]).stages[stage].peak_mib
    changes = []
    candidates = list(candidate_changes(recipe, stage, configs[stage], gpu))
    for settings, same_results in tqdm(candidates, desc=f"changes of {stage}", unit="plan", leave=False, disable=None):
        changed = replace(recipe, **parse_overrides(settings.split()))
        after = plan_memory(changed, configure(changed), gpu, only=[stage]).stages[stage].peak_mib
        if after < 0.99 * before:
            changes.append(Change(settings, after, before - after, same_results))
    return sorted(changes, key=lambda change: change.peak_mib)


def candidate_changes(recipe: Recipe, stage: str, config: Any, gpu: float | None) -> Iterator[tuple[str, bool]]:
    """Settings that may help, and whether a run gives the same results with them, to rounding."""
    total, _, config = for_device(recipe, stage, config, gpu)
    rows, auto = config.per_device_train_batch_size, getattr(config, "auto_sizes", set())
    if rows % 2 == 0 and "per_device_train_batch_size" not in auto:
        fewer = f"{stage}.per_device_train_batch_size={rows // 2}"
        if "mini_batch_size" not in getattr(recipe, stage).args:
            fewer += f" {stage}.gradient_accumulation_steps={2 * config.gradient_accumulation_steps}"
        yield fewer, True
    if not config.gradient_checkpointing:
        yield f"{stage}.gradient_checkpointing=true", True
    key = "rollout_micro_batch_size" if stage == "ppo" else "per_device_eval_batch_size"
    if getattr(config, key) > 1 and key not in auto:
        backend = getattr(config, "generation_backend", "native")
        yield f"{stage}.{key}={getattr(config, key) // 2}", backend in ("native", "eager")
    for key in ("max_prompt_length", "response_length") if stage == "ppo" else ("max_length",):
        if getattr(config, key):
            yield f"{stage}.{key}={getattr(config, key) // 2}", False
    if total is not None and "8bit" not in str(config.optim):
        yield f"{stage}.optim=paged_adamw_8bit", False
    if stage == "ppo" and config.has_critic and config.critic != "head":
        yield "ppo.critic=head", False
    if recipe.lora.r > 1:
        yield f"lora.r={recipe.lora.r // 2}", False
    if recipe.base.quantization is None:
        yield "base.quantization=nf4", False


def best_changes(recipe: Recipe, stage: str, configs: Configs, gpu: float | None = None) -> str:
    """The three single changes that help most, as a sentence."""
    best = helpful_changes(recipe, stage, configs, gpu)[:3]
    return f"What helps most: {'; '.join(map(str, best))}." if best else "No single setting helps."


def size_in_bytes(text: str) -> float:
    """`24GiB`, `24GB`, `24576MiB`, or `24`, which is in GiB. Raises ValueError for anything else."""
    units = {"": 2**30, "gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6}
    match = re.fullmatch(r"([0-9.]+)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in units or match[1].count(".") > 1:
        raise ValueError(f"--gpu={text} is no size of memory. Write 24GiB, 24GB or 24576MiB.")
    return float(match[1]) * units[match[2]]


def plan_as_dict(recipe: Recipe, configs: Configs, plan: MemoryPlan, gpu: float | None) -> dict[str, Any]:
    """The plan as JSON values, in MiB, with changes for each stage that does not fit, or for the largest."""
    largest_stage = max(plan.stages, key=lambda stage: plan.stages[stage].peak_mib)
    stages = {}
    for stage, planned in plan.stages.items():
        helped = stage == largest_stage if plan.fits else not plan.fits_in(stage)
        stages[stage] = {
            "parts": planned.parts,
            "phases": planned.phases,
            "peak_mib": planned.peak_mib,
            "needed_mib": planned.needed_mib,
            "fits": plan.fits_in(stage),
            "work": work_of_step(recipe, stage, configs[stage]),
            "changes": [dataclasses.asdict(c) for c in helpful_changes(recipe, stage, configs, gpu)] if helped else [],
        }
    return {"limit_mib": plan.limit_mib, "fits": plan.fits, "stages": stages}
