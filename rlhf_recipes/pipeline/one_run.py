"""A run without variants: the run folder, the stages in order, skip and resume, progress and the final table."""

import dataclasses
import functools
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import date
from pathlib import Path

import datasets
import transformers
from rich.console import Console
from rich.text import Text
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..data.prepare import Prepared
from ..data.tokens import writes_date
from ..model.base import fingerprint, load_tokenizer, model_path
from ..model.processes import broadcast, is_main, on_main
from ..model.quiet import quiet_libraries
from ..model.split import check_split
from ..plan.cards import this_card
from ..plan.fit import check_memory
from ..plan.hours import seconds_of_stages
from ..recipe.overrides import replace, to_dict
from ..recipe.values import Recipe
from ..records import tracking
from ..records.contents import Summary
from ..records.files import read_json, write_json, writing_in
from ..records.folder import SAME_AGAIN, recipe_to_show, round_folder, write_recipe
from ..records.lock import Wait, held
from ..records.manifest import Manifest, open_run
from ..records.recorder import say_lost_rows
from ..records.summary import footnote, summarize, table
from ..records.trust import remember_own
from ..report.write import write_pages
from ..stages.configure import Configs, stages_of
from ..stages.inputs import check_same_format, prepare_extras, prepare_stage
from ..stages.scores import is_external, reward_tokenizer
from .check import check_recipe
from .rounds import fresh_prompts, later_rounds, run_rounds, unfinished_rounds
from .stage import ActiveRun

NEXT = 2  # commands that a run prints at its end


def run_one(
    recipe: Recipe,
    run_dir: Path,
    stages: Sequence[str] | None,
    force: bool,
    callbacks: Sequence[TrainerCallback],
    wait: Wait = None,
) -> Summary:
    """What `run` does with a recipe without variants: check, take the folder, plan, prepare, train, report."""
    wanted = stages_of(recipe, stages)
    quiet_libraries()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    check_split(recipe.base)
    configs = check_recipe(recipe, run_dir)
    with writing_in(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        with held(run_dir, wait) if is_main() else nullcontext():
            # Nobody goes on before the folder is the main process's and the base is built: transformers saves a model
            # in the first process of a group only.
            on_main(functools.partial(model_path, recipe.base))
            return _run_stages(recipe, run_dir, wanted, configs, force, callbacks, wait)


def _run_stages(
    recipe: Recipe,
    run_dir: Path,
    wanted: list[str],
    configs: Configs,
    force: bool,
    callbacks: Sequence[TrainerCallback],
    wait: Wait,
) -> Summary:
    """What `run_one` does in a folder that is its own."""
    manifest = open_run(recipe, run_dir, wanted)
    for number in (1, *later_rounds(recipe)):
        on_main(functools.partial(say_lost_rows, round_folder(run_dir, number)))
    if (run_dir / "recipe.json").is_file():  # it says what the user has just said himself
        remember_own(run_dir, to_dict(recipe_to_show(run_dir)))
    todo = [stage for stage in wanted if not manifest.is_done(stage)]
    rounds = unfinished_rounds(recipe, run_dir) if "ppo" in wanted else []
    console, waiting = Console(), None
    if todo or rounds:
        ahead = {*todo, *(("reward", "ppo") if rounds else ())}
        to_run = {stage: config for stage, config in configs.items() if stage in ahead}
        plan = check_memory(recipe, to_run, force, console)
        same_sizes(to_run)
        recipe = on_main(functools.partial(dated, recipe, run_dir))
        tokenizer = load_tokenizer(recipe.base)
        base = fingerprint(recipe.base, tokenizer)
        run = ActiveRun(recipe, run_dir, configs, tokenizer, base, plan is not None, tuple(callbacks), console)
        inputs = prepare_inputs(run, todo)
        agenda = [(stage, 1) for stage in todo] + [(stage, n) for n in rounds for stage in ("reward", "ppo")]
        rows = {stage: data.report["train"] for stage, (data, _) in inputs.items()}
        seconds = {} if plan is None else seconds_of_stages(recipe, to_run, plan, rows, this_card())
        run = dataclasses.replace(run, agenda=tuple(agenda), planned_seconds=seconds)
        prompts = fresh_prompts(run) if rounds else []
        # Not before: a recipe whose data were refused may be corrected and run in the same folder.
        on_main(lambda: write_recipe(run_dir, recipe))
        for stage in todo:
            run.train(run.job(stage, *inputs[stage]), manifest)
        waiting = run_rounds(run, rounds, prompts, wait)
    summary, commands = on_main(lambda: write_results(recipe, run_dir, manifest))
    if recipe.artifacts and (todo or rounds) and is_main():
        tracking.upload_report(recipe, run_dir)
    if summary["models"]:
        console.print(table(summary))
    console.print(Text(f"{footnote(summary)}. Run folder: {run_dir}; report: report.html"))
    if waiting is not None:
        console.print(Text(waiting, style="bold"))
    elif commands:
        console.print(Text("What now (more of it is in the folder's README.md):"))
        for command in commands[:NEXT]:
            console.print(Text(f"  {command}"), soft_wrap=True)
    return summary


def same_sizes(configs: Configs) -> None:
    """Let the sizes that a plan has chosen be alike in all processes, whatever memory each has found free."""
    for config in configs.values():
        for name in config.chosen_sizes:
            setattr(config, name, broadcast(getattr(config, name)))


def dated(recipe: Recipe, run_dir: Path) -> Recipe:
    """The recipe with the day on which its run is begun, where a chat template that the run uses writes the date.

    So a run that goes on later sees the same prompts. One that is there already keeps what its recipe says.
    """
    if recipe.base.chat_template_date is not None:
        return recipe
    there = read_json(run_dir / "recipe.json", advice=SAME_AGAIN)
    if there is not None:
        today = there["base"].get("chat_template_date")
    else:
        models = [name for name in recipe.ppo.reward_sources if is_external(name)] if recipe.ppo is not None else []
        tokenizers = [load_tokenizer(recipe.base), *map(reward_tokenizer, models)]
        today = date.today().isoformat() if any(map(writes_date, tokenizers)) else None
    return replace(recipe, base={"chat_template_date": today})


def prepare_inputs(run: ActiveRun, stages: Sequence[str]) -> dict[str, tuple[Prepared, dict[str, Prepared]]]:
    """Each stage's data, and what it takes beside them.

    All of them before the first stage trains, so that whatever is wrong with one is said at once. Raises ValueError.
    """
    data, extras = {}, {}
    with tqdm(total=2 * len(stages), desc="reading data", unit="source", leave=False, disable=None) as bar:
        for stage in stages:
            data[stage] = prepare_stage(run.recipe, stage, run.configs[stage], run.tokenizer)
            bar.update()
        for stage in stages:
            extras[stage] = prepare_extras(run.recipe, stage, run.configs, run.tokenizer, data)
            bar.update()
    check_same_format(data, extras)
    return {stage: (data[stage], extras[stage]) for stage in stages}


def write_results(recipe: Recipe, run_dir: Path, manifest: Manifest) -> tuple[Summary, list[str]]:
    """Write the summary and the report of all that is finished, in the run and its rounds.

    Returns the summary, and the commands that go on from the run.
    """
    rounds = [Manifest.read(round_folder(run_dir, number)) for number in later_rounds(recipe)]
    summary = summarize(manifest, [later for later in rounds if later.stages])
    write_json(run_dir / "summary.json", summary)
    return summary, write_pages(run_dir)
