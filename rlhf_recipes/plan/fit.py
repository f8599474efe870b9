"""What a run asks of the plan: do its stages fit, what will one take with its rows, what helps where memory ran out."""

import copy
import dataclasses
import re
from typing import Any

import pyarrow.compute
from rich.console import Console
from rich.text import Text

from ..data.prepare import Prepared
from ..model.memory import give_back_at_once, peak_memory_mib
from ..recipe.values import Recipe
from ..stages.configure import Configs
from ..stages.job import Job
from .advice import best_changes, over_several, settings_that_fit
from .dry_run import NoPlan
from .plan import MemoryPlan, for_device, plan_memory, settle_auto_sizes, stage_plan
from .stage_memory import StagePlan, gib


def check_memory(recipe: Recipe, configs: Configs, force: bool, console: Console) -> MemoryPlan | None:
    """Plan the stages' memory, print a line of each, and set the sizes that are `auto`.

    Args:
        configs: the trainer configurations of the stages that are to run.
        force: let stages run that do not fit.
    Returns:
        the plan. Where a model cannot be planned for, a warning says so, and there is none.
    Raises:
        ValueError: a stage does not fit; with the changes that help most.
    """
    try:
        for stage, config in configs.items():
            settle_auto_sizes(recipe, stage, config)
        plan = plan_memory(recipe, configs)
    except NoPlan as error:
        console.print(Text(f"warning: {error}", style="yellow"))
        return None
    for stage in plan.stages:
        chosen = configs[stage].chosen_sizes
        sizes = ", ".join(f"{key}={'all' if size is None else size}" for key, size in chosen.items())
        console.print(Text(plan.line(stage) + f"; chosen: {sizes}" * bool(chosen)))
    if not force:
        refuse_misfit(recipe, configs, plan)
    if not plan.on_gpu and max(map(plan.held_mib, plan.stages)) > plan.limit_mib:
        console.print("That is too much: freed memory is given back at once, which is slower.")
        give_back_at_once()
    return plan


def refuse_misfit(recipe: Recipe, configs: Configs, plan: MemoryPlan) -> None:
    """Raises ValueError for the first stage that does not fit, with the three changes that help most."""
    for stage, stage_memory in plan.stages.items():
        if not plan.fits_in(stage):
            settings = settings_that_fit(recipe, stage, configs)
            fits = "No setting that is known makes it fit." if settings is None else f"It fits with {settings}."
            fits = " ".join(filter(None, [fits, over_several(recipe, plan)]))
            raise ValueError(
                f"{stage} does not fit: it is planned to take {gib(stage_memory.peak_mib)} GiB, or with what is held "
                f"beside its tensors {gib(stage_memory.needed_mib)}, of {gib(plan.limit_mib)}. "
                f"{best_changes(recipe, stage, configs)} {fits} To run it all the same: --force."
            )


def plan_for_rows(job: Job) -> StagePlan:
    """The stage's plan for its data's longest row in place of the longest that is allowed."""
    config, (prompt, rest) = copy.copy(job.config), longest_columns(job.data)
    if job.stage == "ppo":
        config.max_prompt_length = prompt
    elif not getattr(config, "packing", False):  # which fills rows up to max_length
        config.max_length = prompt + rest  # DPO's responses are without their prompts
    # Labels are made beside the stages, and no part of what one of them takes.
    gpu, recipe, config = for_device(dataclasses.replace(job.recipe, rounds=None), job.stage, config, None)
    return stage_plan(recipe, job.stage, config, gpu)


def longest_columns(data: Prepared) -> tuple[int, int]:
    """The most tokens in the column `prompt_ids`, and in any other column of token ids; 0 of one that is not there."""
    prompt, rest = 0, 0
    table: Any
    for part in (data.train, data.heldout):
        # The other columns of PPO's prompts are the source's own, whatever they are called.
        is_ppos = "prompt_row" in part.column_names
        names = ["prompt_ids"] if is_ppos else [name for name in part.column_names if name.endswith("_ids")]
        for table in part.select_columns(names).with_format("arrow").iter(batch_size=10_000):
            for name in names:
                column = table[name].combine_chunks()
                if pyarrow.types.is_nested(column.type.value_type):  # rankings have a list of responses
                    column = column.flatten()
                longest = pyarrow.compute.max(pyarrow.compute.list_value_length(column)).as_py()
                if name == "prompt_ids":
                    prompt = max(prompt, longest)
                else:
                    rest = max(rest, longest)
    return prompt, rest


def out_of_memory(error: BaseException, job: Job, plan: StagePlan | None) -> str:
    """What to tell a user whose stage ran out of memory.

    Args:
        error: the allocator's, with notes of what was being done.
        plan: what the stage was planned to take, where that was known.
    """
    doing = f" while {', '.join(error.__notes__)}" if getattr(error, "__notes__", None) else ""
    asked = re.search(r"tried to allocate ([0-9.]+ ?\w+)", str(error), re.IGNORECASE)
    wanted = f"{asked[1]} were asked for, and " if asked else ""
    planned = "" if plan is None else f" The plan was {gib(plan.peak_mib)} GiB."
    return (
        f"{job.stage} ran out of memory{doing}: {wanted}{gib(peak_memory_mib())} GiB were in use at most.{planned} "
        f"{best_changes(job.recipe, job.stage, {job.stage: job.config})} What was computed stays: the same command "
        "resumes, also with other settings that give the same results."
    )
