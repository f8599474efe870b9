"""What a round of feedback after the first begins with: fresh samples of the policy, and their labels."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import release_memory
from transformers import AutoConfig, PreTrainedTokenizerBase

from . import data
from .config import PPOConfig
from .feedback import client, constitution, judge
from .feedback.rows import read_samples
from .feedback.sample import Settings, draw, keep_settings, prompt_id, prompts_of
from .files import read_rows, write_text
from .folder import adapter, load
from .model import longest_row
from .recipe import Recipe, function, is_function
from .rewards import ROLE

PEOPLE = "people"
MODELS = ("base", "sft", "ppo")


def check(recipe: Recipe) -> None:
    """Raises ValueError for rounds that the recipe cannot have."""
    rounds = recipe.rounds
    assert rounds is not None
    if recipe.reward is None or recipe.ppo is None or ROLE not in (recipe.ppo.reward_funcs or (ROLE,)):
        raise ValueError("rounds needs a reward stage and a ppo stage whose reward it is: its labels train that one.")
    for key in ("count", "size"):
        if getattr(rounds, key) < 1:
            raise ValueError(f"rounds.{key} must be above 0, not {getattr(rounds, key)}.")
    if not 0 < rounds.enough <= 1:
        raise ValueError(f"rounds.enough must be above 0 and at most 1, not {rounds.enough}.")
    for name in rounds.models:
        if name not in MODELS:
            example = "rounds.models=('sft','ppo')"
            raise ValueError(f"rounds.models may have {', '.join(MODELS)}, as in {example}, and not {name!r}.")
    try:
        Settings(rounds.models, rounds.temperatures, rounds.responses)
    except ValueError as error:
        raise ValueError(f"rounds: {error}") from error
    _check_labeler(rounds.labeler)
    _criteria(recipe)
    if rounds.weigh_labelers and importlib.util.find_spec("crowdkit") is None:
        raise ValueError("rounds.weigh_labelers needs packages: pip install 'rlhf_recipes[label]'.")


def _check_labeler(labeler: str) -> None:
    """Raises ValueError, before anything is trained, for a labeler that there is not."""
    if is_function(labeler):
        function(labeler)
    elif client.Settings(labeler).is_endpoint:
        if importlib.util.find_spec("openai") is None:
            raise ValueError("rounds.labeler is an endpoint, which needs a package: pip install 'rlhf_recipes[judge]'.")
    elif labeler != PEOPLE and not (Path(labeler) / "recipe.json").is_file():
        try:
            AutoConfig.from_pretrained(labeler)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"rounds.labeler: {labeler!r} is not {PEOPLE!r}, no function (module:function or file.py:function), "
                f"URL, run folder or model that can be loaded: {str(error).splitlines()[0]}"
            ) from error


def folder(run_dir: Path, number: int) -> Path:
    """The run folder of a round; of the first the run's own."""
    return run_dir if number == 1 else run_dir / f"round-{number}"


def fresh_prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: PPOConfig) -> list[data.Prepared]:
    """The prompts of each round from the second on: different ones, in an order that the recipe's seed draws.

    Raises ValueError where the source has fewer prompts than the rounds want.
    """
    rounds = recipe.rounds
    assert rounds is not None
    limit = longest_row(recipe.base, config.max_prompt_length, config.response_length, "ppo.response_length")
    prepared = data.prepare("ppo", prompts_of(recipe), tokenizer, limit, recipe.seed)
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
        data.Prepared(
            prepared.train.select(part), prepared.heldout, prepared.conversational, prepared.stop_token_id, {}
        )
        for part in parts
    ]


def collect(
    recipe: Recipe,
    run_dir: Path,
    number: int,
    prompts: data.Prepared,
    tokenizer: PreTrainedTokenizerBase,
    config: PPOConfig,
) -> Path | None:
    """Sample the policy of the round before on a round's prompts and have the samples ranked.

    What is there already is not done again. Returns the file to train on, or None where people have to label first.
    """
    rounds = recipe.rounds
    assert rounds is not None
    samples, labels = files(run_dir, number)
    seed = recipe.seed + number
    settings = Settings(rounds.models, rounds.temperatures, rounds.responses, config.response_length, seed)
    there = {row["id"] for path in (samples, samples.with_suffix(".left_out.jsonl")) for row in read_rows(path)}
    if not there.issuperset(map(prompt_id, prompts.train["prompt"])):
        keep_settings(samples, settings)
        before = folder(run_dir, number - 1)
        shared = load(recipe, {name: adapter(before, recipe, name) for name in rounds.models})
        draw(shared, tokenizer, prompts, samples, settings, int(config.rollout_micro_batch_size))
        del shared
        release_memory()
    if not _label(recipe, samples, labels, seed):
        return None
    if rounds.weigh_labelers:
        from .feedback import agreement  # needs the extra `label`

        agreement.report(agreement.read([labels])).write(training_file(recipe, run_dir, number))
    return training_file(recipe, run_dir, number)


def files(run_dir: Path, number: int) -> tuple[Path, Path]:
    """A round's files of samples and of labels."""
    place = folder(run_dir, number) / "feedback"
    return place / "samples.jsonl", place / "labels.jsonl"


def training_file(recipe: Recipe, run_dir: Path, number: int) -> Path:
    """What a round gives the reward stage: its labels, with the labelers' weights where the recipe wants them."""
    assert recipe.rounds is not None
    _, labels = files(run_dir, number)
    return labels.with_suffix(".weighted.jsonl") if recipe.rounds.weigh_labelers else labels


def _label(recipe: Recipe, samples: Path, labels: Path, seed: int) -> bool:
    """Have the samples ranked by the recipe's labeler. Returns whether they are."""
    rounds = recipe.rounds
    assert rounds is not None
    if rounds.labeler == PEOPLE:
        judged, wanted = progress(samples, labels)
        return judged >= rounds.enough * wanted
    if is_function(rounds.labeler):
        if not labels.is_file():
            _simulate(rounds.labeler, samples, labels, seed)
    elif len(read_rows(labels)) < len(read_rows(samples)):
        judge.judge(read_samples(samples), labels, client.connect(client.Settings(rounds.labeler)), _criteria(recipe))
        release_memory()
    return True


def _criteria(recipe: Recipe) -> judge.Settings:
    """How a judge judges: by its own criteria, or by the principles of `rounds.constitution`."""
    rounds = recipe.rounds
    assert rounds is not None
    if rounds.constitution is None:
        return judge.Settings(seed=recipe.seed)
    principles = constitution.read(Path(rounds.constitution), needs_principle=True)
    return judge.Settings(tuple(principles), seed=recipe.seed)


def progress(samples: Path, labels: Path) -> tuple[int, int]:
    """How many samples people have judged or skipped, and of how many."""
    judged = [row["id"] for path in (labels, labels.with_suffix(".skipped.jsonl")) for row in read_rows(path)]
    ids = {row["id"] for row in read_rows(samples)}
    return len(ids.intersection(judged)), len(ids)


def instructions(recipe: Recipe, run_dir: Path, number: int) -> str:
    """What to tell people who have to label before a round can go on."""
    samples, labels = files(run_dir, number)
    judged, wanted = progress(samples, labels)
    return (
        f"Round {number} waits for labels: {judged} of {wanted} samples are judged. Label them with\n"
        f"    rlhf-recipes label {samples} --labels {labels}\n"
        "and run the same command again. (rounds.enough is the share that must be judged.)"
    )


def _simulate(labeler: str, samples: Path, labels: Path, seed: int) -> None:
    rows = read_samples(samples)
    prompts, responses = [row["prompt"] for row in rows], [row["responses"] for row in rows]
    rankings: list[Any] = function(labeler)(prompts=prompts, responses=responses, seed=seed)
    if [len(ranking) for ranking in rankings] != [len(of_row) for of_row in responses]:
        raise ValueError(
            f"rounds.labeler={labeler} must return a rank for each response of each of the {len(rows)} prompts."
        )
    judged = [{**row, "ranking": ranks, "labeler": labeler} for row, ranks in zip(rows, rankings, strict=True)]
    write_text(labels, "".join(json.dumps(row) + "\n" for row in judged))
