"""Running one stage: what it will take, its training, and its record in the manifest."""

import copy
import gc
import time
from collections.abc import Callable
from typing import Any

import pyarrow.compute
import torch
from accelerate.utils.memory import should_reduce_batch_size
from rich.console import Console
from rich.text import Text
from transformers import set_seed

from ..model.memory import peak_memory_mib, reset_peak_memory, resident_mib
from ..plan.advice import out_of_memory, refuse_misfit
from ..plan.dry_run import NoPlan
from ..plan.plan import StagePlan, for_device, plan_memory, settle_auto_sizes, stage_plan
from ..recipe.values import Recipe
from ..records.files import write_json
from ..stages.dpo import train_dpo
from ..stages.inputs import rows_line
from ..stages.job import Job
from ..stages.ppo.stage import train_ppo
from ..stages.reward.stage import train_reward
from ..stages.sft import train_sft

# A stage -> what trains it and returns its results.
TRAIN: dict[str, Callable[[Job], dict[str, Any]]] = {
    "sft": train_sft,
    "reward": train_reward,
    "ppo": train_ppo,
    "dpo": train_dpo,
}


def train_stage(job: Job, manifest: dict[str, Any], planned: bool, console: Console) -> None:
    """Run a stage and say what there is to know of it."""
    console.print(Text(f"{job.stage}: {rows_line(job.data.report)}", style="bold"))
    run_stage(job, manifest, plan_for_rows(job) if planned else None)
    for warning in manifest["stages"][job.stage]["results"].get("card", {}).get("warnings", ()):
        console.print(Text(f"warning: {warning}", style="yellow"))


def announce_plan(recipe: Recipe, configs: dict[str, Any], force: bool, console: Console) -> dict[str, StagePlan]:
    """Print what the stages will take, a line each. Raises ValueError where one cannot fit, unless forced."""
    try:
        if "ppo" in configs:
            settle_auto_sizes(recipe, configs["ppo"])
        found = plan_memory(recipe, configs)
    except NoPlan as error:
        console.print(Text(f"warning: {error}", style="yellow"))
        return {}
    for stage in found.stages:
        console.print(Text(found.line(stage)))
    if not force:
        refuse_misfit(recipe, configs, found)
    return found.stages


def plan_for_rows(job: Job) -> StagePlan:
    """The stage's plan for its data's longest row in place of the longest that is allowed."""
    config, prompts, others = copy.copy(job.config), 0, 0
    table: Any
    for part in (job.data.train, job.data.heldout):
        names = [name for name in part.column_names if name.endswith("_ids")]
        for table in part.select_columns(names).with_format("arrow").iter(batch_size=10_000):
            for name in names:
                column = table[name].combine_chunks()
                if pyarrow.types.is_nested(column.type.value_type):  # the reward stage's rows have K responses each
                    column = column.flatten()
                longest = pyarrow.compute.max(pyarrow.compute.list_value_length(column)).as_py()
                if name == "prompt_ids":
                    prompts = max(prompts, longest)
                else:
                    others = max(others, longest)
    if job.stage == "ppo":
        config.max_prompt_length = prompts
    elif not getattr(config, "packing", False):  # which fills rows up to max_length
        config.max_length = prompts + others  # DPO's responses are without their prompts
    on_gpu, recipe, config = for_device(job.recipe, job.stage, config, None)
    return stage_plan(recipe, job.stage, config, on_gpu)


def run_stage(job: Job, manifest: dict[str, Any], planned: StagePlan | None) -> None:
    """Run one stage between two writes of the manifest: `running` before, `done` with its results after.

    Raises ValueError, with what to change, where it runs out of memory.
    """
    record = manifest["stages"].setdefault(job.stage, {"seconds": 0.0, "peak_memory_mib": 0.0})
    record |= {"state": "running", "data": job.data.report}
    write_json(job.run_dir / "manifest.json", manifest)
    job.folder.mkdir(parents=True, exist_ok=True)
    set_seed(job.recipe.seed)
    start, before = time.perf_counter(), record["seconds"]
    reset_peak_memory()
    if planned is not None:
        # On a CPU the measured peak is that of the process, with all that it has loaded before.
        already = 0.0 if torch.cuda.is_available() else resident_mib()
        record["planned_peak_mib"] = round(planned.peak_mib + already, 1)
    try:
        with job.tracked() as tracked:
            record["results"] = TRAIN[job.stage](tracked)
            took = {"seconds": before + time.perf_counter() - start, "peak_memory_mib": peak_memory_mib()}
            tracked.conclude(record["results"] | took)
        record["state"] = "done"
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not should_reduce_batch_size(error):
            raise
        raise ValueError(out_of_memory(error, job.recipe, job.stage, job.config, planned)) from error
    finally:
        record["seconds"] = round(before + time.perf_counter() - start, 1)
        record["peak_memory_mib"] = max(record["peak_memory_mib"], round(peak_memory_mib(), 1))
        write_json(job.run_dir / "manifest.json", manifest)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
