"""Rounds of feedback after the first: fresh samples of the policy, their labels, and training on all labels so far."""

import copy
import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.text import Text

from ..data.prepare import Prepared, merge_comparisons, prepare
from ..feedback.agreement import agreement_report
from ..feedback.client import ModelSettings
from ..feedback.connect import connect
from ..feedback.judge import judge_samples
from ..feedback.rows import read_judgements, read_samples
from ..feedback.sample import SampleSettings, draw_samples, keep_sample_settings, prompt_id, prompts_to_rank
from ..feedback.simulate import label_by_function
from ..model.base import longest_row
from ..model.memory import release
from ..model.open import open_models
from ..model.processes import is_main, on_main
from ..recipe.lookup import is_function
from ..recipe.values import PEOPLE, Recipe
from ..records.files import beside, read_rows, write_text
from ..records.folder import adapter_folder, round_folder, write_recipe
from ..records.lock import Wait, held
from ..records.manifest import Manifest
from ..stages.inputs import prepare_extras, prepare_stage
from .check import judge_prices, judge_settings
from .stage import ActiveRun


def later_rounds(recipe: Recipe) -> range:
    """The numbers of a recipe's rounds after the first."""
    return range(2, 1 if recipe.rounds is None else recipe.rounds.count + 1)


def unfinished_rounds(recipe: Recipe, run_dir: Path) -> list[int]:
    """The numbers of the rounds after the first whose policy is not trained to the end."""
    return [n for n in later_rounds(recipe) if not Manifest.to_go_on(round_folder(run_dir, n)).is_done("ppo")]


def fresh_prompts(run: ActiveRun) -> list[Prepared]:
    """The prompts of each round from the second on: different ones, in an order that the recipe's seed draws.

    Raises ValueError where the source has fewer prompts than the rounds want.
    """
    recipe, config, rounds = run.recipe, run.configs["ppo"], run.recipe.rounds
    assert rounds is not None
    limit = longest_row(recipe.base, config.max_prompt_length, config.response_length, "ppo.response_length")
    prepared = prepare("ppo", prompts_to_rank(recipe), run.tokenizer, limit, recipe.seed)
    rows = {prompt_id(prompt): index for index, prompt in reversed(list(enumerate(prepared.train["prompt"])))}
    wanted = rounds.size * (rounds.count - 1)
    if len(rows) < wanted:
        raise ValueError(
            f"rounds: {prepared.report['source']} has {len(rows)} different prompts, and {rounds.count - 1} rounds of "
            f"{rounds.size} want {wanted}. Lower rounds.size or rounds.count, or set rounds.prompts."
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    picked = [list(rows.values())[index] for index in order[:wanted]]
    parts = [picked[start : start + rounds.size] for start in range(0, wanted, rounds.size)]
    return [dataclasses.replace(prepared, train=prepared.train.select(part)) for part in parts]


def run_rounds(run: ActiveRun, numbers: Sequence[int], prompts: Sequence[Prepared], wait: Wait) -> str | None:
    """Run rounds, as far as their labels go.

    Args:
        numbers: of the rounds that are left.
        prompts: those of each round from the second on, as `fresh_prompts` returns them.
        wait: for a process that works in a round's folder, as `held` does.
    Returns:
        what to tell the people who have to label before the next round can go on; None where nothing is left to do.
    """
    for number in numbers:
        folder = round_folder(run.run_dir, number)
        on_main(lambda folder=folder: folder.mkdir(exist_ok=True))
        with held(folder, wait) if is_main() else nullcontext():  # it may be run by itself, too
            run.stop_in_order()
            on_main(functools.partial(collect_samples, run, number, prompts[number - 2]))
            run.stop_in_order()
            if not on_main(functools.partial(collect_labels, run, number)):
                return labelling_instructions(run.run_dir, number)
            train_round(run, number)
    return None


def train_round(run: ActiveRun, number: int) -> None:
    """Train the reward model on all comparisons up to this round, and the policy of the round before against it."""
    folder = round_folder(run.run_dir, number)
    manifest = Manifest.to_go_on(folder)
    on_main(lambda: write_recipe(folder, run.recipe))
    for stage in ("reward", "ppo"):
        if manifest.is_done(stage):
            continue
        config = copy.copy(run.configs[stage])
        config.output_dir, config.run_name = str(folder / stage), f"{run.run_dir.name}-{folder.name}-{stage}"
        config.data_seed = run.recipe.seed + number  # each round takes the rows in another order
        data = prepare_stage(run.recipe, stage, config, run.tokenizer)
        if stage == "reward":
            data = merge_comparisons([data, *labelled_comparisons(run, number)])
        extras = prepare_extras(run.recipe, stage, run.configs, run.tokenizer, {})
        run.console.print(Text(f"round {number}", style="bold"), end=", ")
        run.train(run.job(stage, data, extras, config, number), manifest)


def labelled_comparisons(run: ActiveRun, number: int) -> Iterator[Prepared]:
    """The labels of each round up to this one, with the round as their source where they name none."""
    recipe = run.recipe
    assert recipe.reward is not None
    limit = longest_row(recipe.base, run.configs["reward"].max_length)
    for earlier in range(2, number + 1):
        path = str(training_file(recipe, run.run_dir, earlier))
        source = dataclasses.replace(recipe.reward, data=path, columns={}, convert=None, limit=None)
        part = prepare("reward", source, run.tokenizer, limit, recipe.seed)
        if "source" not in part.train.column_names:  # the reward card then tells the rounds apart
            named = {side: [f"round-{earlier}"] * len(getattr(part, side)) for side in ("train", "heldout")}
            train, heldout = (getattr(part, side).add_column("source", named[side]) for side in named)
            part = dataclasses.replace(part, train=train, heldout=heldout)
        yield part


def collect_samples(run: ActiveRun, number: int, prompts: Prepared) -> None:
    """Sample the policy of the round before on those of a round's prompts that have no samples yet."""
    samples, _ = feedback_files(run.run_dir, number)
    sampled = {row["id"] for path in (samples, beside(samples, "left_out.jsonl")) for row in read_rows(path)}
    if not sampled.issuperset(map(prompt_id, prompts.train["prompt"])):
        sample_policies(run, number, prompts, samples)


def collect_labels(run: ActiveRun, number: int) -> bool:
    """Have a round's samples ranked, as far as they are not yet.

    Returns whether there is a file to train on: people may have to label first.
    """
    recipe, rounds = run.recipe, run.recipe.rounds
    assert rounds is not None
    samples, labels = feedback_files(run.run_dir, number)
    if not have_labelled(recipe, samples, labels, recipe.seed + number):
        return False
    freeze_labels(labels, rounds.weigh_labelers)
    return True


def freeze_labels(labels: Path, weigh: bool) -> None:
    """Keep apart what a round trains on, once: people may go on labelling, and a resumed stage must see the same rows.

    Args:
        weigh: with the labelers' weights.
    Raises:
        ValueError: there are none.
    """
    frozen = frozen_labels(labels)
    if not read_rows(frozen):
        rows = read_rows(labels)
        if not rows:
            raise ValueError(f"{labels} holds no labels to train on. Label some samples, and run the same again.")
        now = beside(labels, "now.jsonl")
        write_text(now, "".join(json.dumps(row) + "\n" for row in rows))
        if weigh:
            agreement_report(read_judgements([now])).write(now)
        os.replace(now, frozen)


def frozen_labels(labels: Path) -> Path:
    """Where `freeze_labels` puts a file of labels."""
    return beside(labels, "trained.jsonl")


def sample_policies(run: ActiveRun, number: int, prompts: Prepared, samples: Path) -> None:
    """Write samples of the models of the round before, to each of the prompts that has none yet."""
    rounds, config = run.recipe.rounds, run.configs["ppo"]
    assert rounds is not None
    seed = run.recipe.seed + number
    settings = SampleSettings(rounds.models, rounds.temperatures, rounds.responses, config.response_length, seed)
    before = round_folder(run.run_dir, number - 1)
    folders = {name: adapter_folder(before, run.recipe, name) for name in rounds.models}
    with held(samples):
        keep_sample_settings(samples, settings, run.recipe, run.tokenizer, folders)
        shared = open_models(run.recipe, folders)
        draw_samples(shared, run.tokenizer, prompts, samples, settings, int(config.rollout_micro_batch_size))
    del shared
    release()


def feedback_files(run_dir: Path, number: int) -> tuple[Path, Path]:
    """A round's files of samples and of labels."""
    place = round_folder(run_dir, number) / "feedback"
    return place / "samples.jsonl", place / "labels.jsonl"


def training_file(recipe: Recipe, run_dir: Path, number: int) -> Path:
    """What a round gives the reward stage: its labels as they were when it began to train."""
    _, labels = feedback_files(run_dir, number)
    if (frozen := frozen_labels(labels)).is_file():
        return frozen
    # A round that version 0.4 or before has trained.
    assert recipe.rounds is not None
    return beside(labels, "weighted.jsonl") if recipe.rounds.weigh_labelers else labels


def have_labelled(recipe: Recipe, samples: Path, labels: Path, seed: int) -> bool:
    """Have the samples ranked by the recipe's labeler. Returns whether they are."""
    rounds = recipe.rounds
    assert rounds is not None
    if rounds.labeler == PEOPLE:
        judged, wanted = labelling_progress(samples, labels)
        return judged >= rounds.enough * wanted
    if len(read_rows(labels)) >= len(read_rows(samples)):
        return True
    if is_function(rounds.labeler):
        label_by_function(rounds.labeler, samples, labels, seed)
    else:
        judge = connect(ModelSettings(rounds.labeler, api_key_env=rounds.api_key_env))
        found = judge_samples(read_samples(samples), labels, judge, judge_settings(recipe), judge_prices(recipe))
        if found["stopped"]:
            raise ValueError(
                f"rounds.max_cost={rounds.max_cost}: {found['labels']} of the {found['of']} labels of this round have "
                f"cost {found['cost']:.4f}. Raise it, and run the same again."
            )
        if found["of"] - found["failed"] < rounds.enough * found["of"]:
            raise ValueError(
                f"rounds.labeler: {rounds.labeler} failed on {found['failed']} of the {found['of']} samples of this "
                "round. Run the same again, which asks for those alone, or lower rounds.enough to go on without them."
            )
        release()
    return True


def labelling_progress(samples: Path, labels: Path) -> tuple[int, int]:
    """How many samples people have judged or skipped, and of how many."""
    judged = [row["id"] for path in (labels, beside(labels, "skipped.jsonl")) for row in read_rows(path)]
    ids = {row["id"] for row in read_rows(samples)}
    return len(ids.intersection(judged)), len(ids)


def labelling_instructions(run_dir: Path, number: int) -> str:
    """What to tell people who have to label before a round can go on."""
    samples, labels = feedback_files(run_dir, number)
    judged, wanted = labelling_progress(samples, labels)
    return (
        f"Round {number} waits for labels: {judged} of {wanted} samples are judged. Label them with\n"
        f"    rlhf-recipes label {samples} --labels {labels}\n"
        "and run the same command again. (rounds.enough is the share that must be judged.)"
    )
