"""What to change where a plan does not fit: each change with what it buys."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from ..recipe.overrides import parse_overrides, replace
from ..recipe.values import Recipe
from ..stages.configure import Configs, configure
from .cards import Card
from .hours import hours, seconds_of_step
from .plan import MemoryPlan, for_device, plan_memory
from .stage_memory import gib
from .work import work_of_step

MOST_CHANGES = 3  # of results, before a stage is said not to fit


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
    rows, auto = config.per_device_train_batch_size, config.auto_sizes
    if rows % 2 == 0 and not auto & {"per_device_train_batch_size", "gradient_accumulation_steps"}:
        fewer = f"{stage}.per_device_train_batch_size={rows // 2}"
        if "mini_batch_size" not in getattr(recipe, stage).args:
            fewer += f" {stage}.gradient_accumulation_steps={2 * config.gradient_accumulation_steps}"
        yield fewer, True
    first = getattr(config, "checkpointed_layers", None)
    if (not config.gradient_checkpointing or first is not None) and "gradient_checkpointing" not in auto:
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


def over_several(recipe: Recipe, plan: MemoryPlan) -> str | None:
    """What there is beside settings where a plan of one GPU does not fit: more of them."""
    if plan.fits or not plan.on_gpu or recipe.base.split is not None:
        return None
    return (
        "base.split=layers lays the base over all GPUs of a machine, which then work one after another; with "
        "base.split=shards and --processes, their number, they work side by side and send each other every layer."
    )


def settings_that_fit(recipe: Recipe, stage: str, configs: Configs, gpu: float | None = None) -> str | None:
    """Settings, as the command line takes them, with which a stage fits that does not; None where none were found.

    All that leaves the results as they are goes as low as it can. Where that is not enough, the change that saves most
    comes with it, and the next. Then rows are doubled again, as often as they still fit.
    """

    def plan(settings: dict[str, str]) -> MemoryPlan:
        changed = changed_by(settings)
        return plan_memory(changed, configure(changed), gpu, only=[stage])

    def changed_by(settings: dict[str, str]) -> Recipe:
        return replace(recipe, **parse_overrides(f"{key}={value}" for key, value in settings.items()))

    def candidates(settings: dict[str, str], same_results: bool) -> list[dict[str, str]]:
        changed = changed_by(settings)
        found = candidate_changes(changed, stage, configure(changed)[stage], gpu)
        return [_as_dict(words) for words, same in found if same == same_results]

    chosen: dict[str, str] = {}
    while lower := candidates(chosen, same_results=True):
        for settings in lower:
            chosen |= settings
    planned = plan(chosen)
    for _ in range(MOST_CHANGES):
        if planned.fits:
            break
        changes = [chosen | settings for settings in candidates(chosen, same_results=False)]
        tried = [(plan(settings), settings) for settings in changes]
        planned, chosen = min([(planned, chosen), *tried], key=lambda pair: pair[0].peak_mib)
    if not planned.fits:
        return None
    original = configs[stage]
    for key in ("rollout_micro_batch_size", "per_device_eval_batch_size", "per_device_train_batch_size"):
        while f"{stage}.{key}" in chosen:
            larger = doubled(chosen, f"{stage}.{key}", getattr(original, key))
            if larger is None or not plan(larger).fits:
                break
            chosen = larger
    return " ".join(f"{key}={value}" for key, value in chosen.items())


def doubled(settings: dict[str, str], key: str, most: int) -> dict[str, str] | None:
    """Settings with twice the rows under a key, and half the batches that add up to a step; None beyond `most` rows.

    A key with as many rows as at first is no change.
    """
    rows = 2 * int(settings[key])
    if rows > most:
        return None
    settings, changed = settings | {key: str(rows)}, [key]
    steps = f"{key.split('.')[0]}.gradient_accumulation_steps"
    if "train" in key and steps in settings:
        settings[steps] = str(int(settings[steps]) // 2)
        changed.append(steps)
    return {name: value for name, value in settings.items() if name not in changed or rows < most}


def _as_dict(words: str) -> dict[str, str]:
    """Settings as the command line takes them, by their keys."""
    return dict(word.split("=", 1) for word in words.split())


def plan_as_dict(
    recipe: Recipe, configs: Configs, plan: MemoryPlan, gpu: float | None, card: Card | None = None
) -> dict[str, Any]:
    """The plan as JSON values, in MiB, with changes for each stage that does not fit, or for the largest.

    Of a `card` whose rates are known with the least and the most seconds of each phase of a step, and hours.
    """
    largest_stage = max(plan.stages, key=lambda stage: plan.stages[stage].peak_mib)
    stages = {}
    for stage, planned in plan.stages.items():
        helped = stage == largest_stage if plan.fits else not plan.fits_in(stage)
        work, seconds = work_of_step(recipe, stage, configs[stage]), None
        if card is not None and card.tflops is not None:
            _, on_card, config = for_device(recipe, stage, configs[stage], gpu)
            seconds = seconds_of_step(on_card, stage, config, planned, card)
        stages[stage] = {
            "parts": planned.parts,
            "phases": planned.phases,
            "peak_mib": planned.peak_mib,
            "needed_mib": planned.needed_mib,
            "fits": plan.fits_in(stage),
            "work": work,
            "seconds": seconds,
            "hours": seconds and hours(seconds, work["steps"]),
            "changes": [dataclasses.asdict(c) for c in helpful_changes(recipe, stage, configs, gpu)] if helped else [],
            "fits_with": None if plan.fits_in(stage) else settings_that_fit(recipe, stage, configs, gpu),
        }
    return {"limit_mib": plan.limit_mib, "fits": plan.fits, "several": over_several(recipe, plan), "stages": stages}
