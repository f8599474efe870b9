"""A run without variants: the run folder, the stages in order, skip and resume, progress and the final table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import transformers
from rich.console import Console
from rich.text import Text
from transformers import TrainerCallback

from ..model.base import fingerprint, load_tokenizer
from ..model.quiet import quiet_libraries
from ..recipe.overrides import to_dict
from ..recipe.values import Recipe
from ..records import tracking
from ..records.files import write_json
from ..records.folder import last_checkpoint, round_folder
from ..records.manifest import open_run, read_manifest
from ..records.summary import footnote, summarize, table
from ..report.write import write_report
from ..stages.configure import stages_of
from ..stages.inputs import check_same_format, prepare_beside, prepare_stage
from ..stages.job import Job
from .check import check_recipe
from .rounds import collect_labels, fresh_prompts, labelling_instructions, later_rounds, run_round, unfinished_rounds
from .stage import announce_plan, train_stage


def run_one(
    recipe: Recipe,
    run_dir: Path,
    stages: Sequence[str] | None,
    force: bool,
    callbacks: Sequence[TrainerCallback],
) -> dict[str, Any]:
    """What `run` does with a recipe without variants."""
    wanted = stages_of(recipe, stages)
    quiet_libraries()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    configs = check_recipe(recipe, run_dir)
    manifest = open_run(recipe, run_dir, wanted)
    todo = [stage for stage in wanted if manifest["stages"].get(stage, {}).get("state") != "done"]
    later = unfinished_rounds(recipe, run_dir) if "ppo" in wanted else []
    console, waiting = Console(), None
    if todo or later:
        ahead = [stage for stage in configs if stage in todo or (later and stage in ("reward", "ppo"))]
        planned = announce_plan(recipe, {stage: configs[stage] for stage in ahead}, force, console)
        tokenizer = load_tokenizer(recipe.base)
        manifest["base"] = fingerprint(recipe.base, tokenizer)
        prepared = {stage: prepare_stage(recipe, stage, configs[stage], tokenizer) for stage in todo}
        others = {stage: prepare_beside(recipe, stage, configs, tokenizer, prepared) for stage in todo}
        check_same_format(prepared, others)
        prompts = fresh_prompts(recipe, tokenizer, configs["ppo"]) if later else []
        # Not before: a recipe whose data were refused may be corrected and run in the same folder.
        write_json(run_dir / "recipe.json", to_dict(recipe))
        for stage in todo:
            resume = last_checkpoint(run_dir / stage)
            of_stage = others[stage], prepared[stage], tokenizer, manifest["base"], resume
            job = Job(recipe, stage, run_dir, configs[stage], *of_stage, callbacks=tuple(callbacks))
            train_stage(job, manifest, bool(planned), console)
        for number in later:
            labels = collect_labels(recipe, run_dir, number, prompts[number - 2], tokenizer, configs["ppo"])
            if labels is None:
                waiting = labelling_instructions(recipe, run_dir, number)
                break
            run_round(recipe, run_dir, number, configs, tokenizer, bool(planned), console, tuple(callbacks))
    manifests = [read_manifest(round_folder(run_dir, number)) for number in later_rounds(recipe)]
    result = summarize(manifest, [of_round for of_round in manifests if of_round["stages"]])
    write_json(run_dir / "summary.json", result)
    written = write_report([run_dir], run_dir / "report.html")
    if recipe.artifacts and (todo or later):
        tracking.upload_report(recipe, run_dir)
    if result["models"]:
        console.print(table(result))
    console.print(Text(f"{footnote(result)}. Run folder: {run_dir}; report: {written.name}"))
    if waiting is not None:
        console.print(Text(waiting, style="bold"))
    return result
