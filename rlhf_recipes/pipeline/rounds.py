"""What a round of feedback after the first begins with: fresh samples of the policy, and their labels."""

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import release_memory
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase, TrainerCallback

from ..data.prepare import Prepared, merge_comparisons, prepare
from ..feedback.agreement import agreement_report
from ..feedback.client import ModelSettings
from ..feedback.connect import connect
from ..feedback.judge import judge_samples
from ..feedback.rows import read_judgements, read_samples
from ..feedback.sample import SampleSettings, draw_samples, keep_sample_settings, prompt_id, prompts_to_rank
from ..model.base import fingerprint, longest_row
from ..model.open import open_models
from ..recipe.lookup import function, is_function
from ..recipe.overrides import to_dict
from ..recipe.values import Recipe
from ..records.files import read_rows, write_json, write_text
from ..records.folder import adapter_folder, last_checkpoint, round_folder
from ..records.manifest import read_manifest
from ..stages.inputs import prepare_beside, prepare_stage
from ..stages.job import Job
from ..stages.options import PPOConfig
from .check import PEOPLE, judge_settings
from .stage import train_stage


def later_rounds(recipe: Recipe) -> range:
    return range(2, 1 if recipe.rounds is None else recipe.rounds.count + 1)


def unfinished_rounds(recipe: Recipe, run_dir: Path) -> list[int]:
    found = {number: read_manifest(round_folder(run_dir, number))["stages"] for number in later_rounds(recipe)}
    return [number for number, stages in found.items() if stages.get("ppo", {}).get("state") != "done"]


def run_round(
    recipe: Recipe,
    run_dir: Path,
    number: int,
    configs: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    planned: bool,
    console: Console,
    callbacks: tuple[TrainerCallback, ...],
) -> None:
    """Train the reward model on all comparisons up to this round, and the policy of the round before against it."""
    folder = round_folder(run_dir, number)
    manifest = read_manifest(folder)
    manifest["base"] = fingerprint(recipe.base, tokenizer)
    write_json(folder / "recipe.json", to_dict(recipe))
    for stage in ("reward", "ppo"):
        if manifest["stages"].get(stage, {}).get("state") == "done":
            continue
        config = copy.copy(configs[stage])
        config.output_dir, config.run_name = str(folder / stage), f"{run_dir.name}-{folder.name}-{stage}"
        config.data_seed = recipe.seed + number  # each round takes the rows in another order
        prepared = prepare_stage(recipe, stage, config, tokenizer)
        if stage == "reward":
            prepared = merge_comparisons([prepared, *labelled_comparisons(recipe, run_dir, number, tokenizer, config)])
        others = prepare_beside(recipe, stage, configs, tokenizer, {})
        of_stage = others, prepared, tokenizer, manifest["base"], last_checkpoint(folder / stage)
        job = Job(recipe, stage, folder, config, *of_stage, round=number, callbacks=callbacks)
        console.print(Text(f"round {number}", style="bold"), end=", ")
        train_stage(job, manifest, planned, console)


def labelled_comparisons(
    recipe: Recipe, run_dir: Path, number: int, tokenizer: PreTrainedTokenizerBase, config: Any
) -> Iterator[Prepared]:
    """The labels of each round up to this one, with the round as their source where they name none."""
    for earlier in range(2, number + 1):
        path = str(training_file(recipe, run_dir, earlier))
        assert recipe.reward is not None
        source = dataclasses.replace(recipe.reward, data=path, columns={}, convert=None, limit=None)
        limit = longest_row(recipe.base, config.max_length)
        part = prepare("reward", source, tokenizer, limit, recipe.seed)
        if "source" not in part.train.column_names:  # the reward card then tells the rounds apart
            named = {side: [f"round-{earlier}"] * len(getattr(part, side)) for side in ("train", "heldout")}
            train, heldout = (getattr(part, side).add_column("source", named[side]) for side in named)
            part = dataclasses.replace(part, train=train, heldout=heldout)
        yield part


def fresh_prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: PPOConfig) -> list[Prepared]:
    """The prompts of each round from the second on: different ones, in an order that the recipe's seed draws.

    Raises ValueError where the source has fewer prompts than the rounds want.
    """
    rounds = recipe.rounds
    assert rounds is not None
    limit = longest_row(recipe.base, config.max_prompt_length, config.response_length, "ppo.response_length")
    prepared = prepare("ppo", prompts_to_rank(recipe), tokenizer, limit, recipe.seed)
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
    return [
        Prepared(prepared.train.select(part), prepared.heldout, prepared.conversational, prepared.stop_token_id, {})
        for part in parts
    ]


def collect_labels(
    recipe: Recipe,
    run_dir: Path,
    number: int,
    prompts: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    config: PPOConfig,
) -> Path | None:
    """Sample the policy of the round before on a round's prompts and have the samples ranked.

    What is there already is not done again. Returns the file to train on, or None where people have to label first.
    """
    rounds = recipe.rounds
    assert rounds is not None
    samples, labels = feedback_files(run_dir, number)
    seed = recipe.seed + number
    settings = SampleSettings(rounds.models, rounds.temperatures, rounds.responses, config.response_length, seed)
    there = {row["id"] for path in (samples, samples.with_suffix(".left_out.jsonl")) for row in read_rows(path)}
    if not there.issuperset(map(prompt_id, prompts.train["prompt"])):
        keep_sample_settings(samples, settings)
        before = round_folder(run_dir, number - 1)
        shared = open_models(recipe, {name: adapter_folder(before, recipe, name) for name in rounds.models})
        draw_samples(shared, tokenizer, prompts, samples, settings, int(config.rollout_micro_batch_size))
        del shared
        release_memory()
    if not _have_labelled(recipe, samples, labels, seed):
        return None
    if rounds.weigh_labelers:
        agreement_report(read_judgements([labels])).write(training_file(recipe, run_dir, number))
    return training_file(recipe, run_dir, number)


def feedback_files(run_dir: Path, number: int) -> tuple[Path, Path]:
    """A round's files of samples and of labels."""
    place = round_folder(run_dir, number) / "feedback"
    return place / "samples.jsonl", place / "labels.jsonl"


def training_file(recipe: Recipe, run_dir: Path, number: int) -> Path:
    """What a round gives the reward stage: its labels, with the labelers' weights where the recipe wants them."""
    assert recipe.rounds is not None
    _, labels = feedback_files(run_dir, number)
    return labels.with_suffix(".weighted.jsonl") if recipe.rounds.weigh_labelers else labels


def _have_labelled(recipe: Recipe, samples: Path, labels: Path, seed: int) -> bool:
    """Have the samples ranked by the recipe's labeler. Returns whether they are."""
    rounds = recipe.rounds
    assert rounds is not None
    if rounds.labeler == PEOPLE:
        judged, wanted = labelling_progress(samples, labels)
        return judged >= rounds.enough * wanted
    if is_function(rounds.labeler):
        if not labels.is_file():
            _label_by_function(rounds.labeler, samples, labels, seed)
    elif len(read_rows(labels)) < len(read_rows(samples)):
        judge_samples(read_samples(samples), labels, connect(ModelSettings(rounds.labeler)), judge_settings(recipe))
        release_memory()
    return True


def labelling_progress(samples: Path, labels: Path) -> tuple[int, int]:
    """How many samples people have judged or skipped, and of how many."""
    judged = [row["id"] for path in (labels, labels.with_suffix(".skipped.jsonl")) for row in read_rows(path)]
    ids = {row["id"] for row in read_rows(samples)}
    return len(ids.intersection(judged)), len(ids)


def labelling_instructions(recipe: Recipe, run_dir: Path, number: int) -> str:
    """What to tell people who have to label before a round can go on."""
    samples, labels = feedback_files(run_dir, number)
    judged, wanted = labelling_progress(samples, labels)
    return (
        f"Round {number} waits for labels: {judged} of {wanted} samples are judged. Label them with\n"
        f"    rlhf-recipes label {samples} --labels {labels}\n"
        "and run the same command again. (rounds.enough is the share that must be judged.)"
    )


def _label_by_function(labeler: str, samples: Path, labels: Path, seed: int) -> None:
    rows = read_samples(samples)
    prompts, responses = [row["prompt"] for row in rows], [row["responses"] for row in rows]
    rankings: list[Any] = function(labeler)(prompts=prompts, responses=responses, seed=seed)
    if [len(ranking) for ranking in rankings] != [len(of_row) for of_row in responses]:
        raise ValueError(
            f"rounds.labeler={labeler} must return a rank for each response of each of the {len(rows)} prompts."
        )
    judged = [{**row, "ranking": ranks, "labeler": labeler} for row, ranks in zip(rows, rankings, strict=True)]
    write_text(labels, "".join(json.dumps(row) + "\n" for row in judged))
