"""Sampling what is to be ranked: K responses to each prompt, from one or several policies of a run."""

import dataclasses
import difflib
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from ..data.prepare import OURS, Prepared, prepare
from ..data.sources import MOST_RESPONSES
from ..model.base import load_tokenizer, longest_row
from ..model.open import model_identity, open_models
from ..model.sampler import Sampler
from ..model.shared import SharedBase
from ..recipe.values import Recipe, Source
from ..records.digest import digest, row_id
from ..records.files import Journal, beside, check_place
from ..records.folder import adapter_folder, read_recipe
from ..records.lock import held
from .rows import Row, keep_settings

AT_ONCE = 64  # prompts whose responses are drawn from one seed, and written together

Drawn = tuple[str, dict[str, Any]]  # a response, and its origin: model, temperature, seed, attempt


@dataclass(frozen=True)
class SampleSettings:
    """How samples are drawn. The same settings give the same samples, whenever they are interrupted."""

    models: tuple[str, ...] = ("ppo",)  # base, sft, ppo, dpo, or a folder with an adapter inside the run
    temperatures: tuple[float, ...] = (1.0,)
    k: int = 4  # responses to each prompt
    response_length: int = 256  # tokens at most
    seed: int = 0
    similarity: float = 0.9  # a response that shares so much of its words with another of the prompt is drawn again
    attempts: int = 3  # to draw a response, the first one included

    def __post_init__(self) -> None:
        if not 2 <= self.k <= MOST_RESPONSES:
            raise ValueError(f"k must be 2 to {MOST_RESPONSES}, not {self.k}.")
        for name in ("response_length", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}.")
        if not self.models:
            raise ValueError("models must name at least one.")
        if not self.temperatures or not all(0 < temperature < math.inf for temperature in self.temperatures):
            raise ValueError(f"temperatures must be above 0, not {', '.join(map(str, self.temperatures)) or 'none'}.")
        if not 0 < self.similarity <= 1:
            raise ValueError(f"similarity must be above 0 and at most 1, not {self.similarity}.")


def sample_responses(
    run: Path | Recipe,
    prompts: Source,
    out: Path,
    settings: SampleSettings,
    batch_size: int = 64,
    limit: int | None = None,
) -> dict[str, int]:
    """Write K responses to each prompt of a source to the file `out`, or go on with what an earlier call left of it.

    Responses take turns among all pairs of a model and a temperature. Those nearly equal to another of their prompt are
    drawn again; a prompt that gets no two different ones goes to the file *.left_out.jsonl beside `out`.

    Args:
        run: a run folder with its finished adapters, or a recipe, of which only the bare base can answer yet.
        prompts: rows with what the `ppo` stage takes. Equal prompts are taken once.
        batch_size: rows sampled at once: memory and speed alone.
        limit: take only so many different prompts, drawn by their ids, which are hashes.
    Returns:
        numbers of prompts written in all (samples), of those with fewer than k responses (short) and left out.
    Raises:
        ValueError: no run folder, no such model in it, prompts that cannot be read or are too long, or `out` was made
            with other settings.
    """
    if isinstance(run, Recipe):
        if settings.models != ("base",):
            raise ValueError(f"{run.name} is a recipe that nothing was trained for: only its base can be sampled.")
        recipe, folders = run, dict[str, Path | None](base=None)
    else:
        recipe = read_recipe(run)
        folders = {name: adapter_folder(run, recipe, name) for name in settings.models}
    tokenizer = load_tokenizer(recipe.base)
    longest = longest_row(recipe.base, None, settings.response_length, "response_length")
    prepared = prepare("ppo", _all_rows(prompts), tokenizer, longest)
    with held(out):
        keep_sample_settings(out, settings, recipe, tokenizer, folders)
        return draw_samples(open_models(recipe, folders), tokenizer, prepared, out, settings, batch_size, limit)


def _all_rows(prompts: Source) -> Source:
    """A source of which nothing is held out."""
    return dataclasses.replace(prompts, heldout=0.0)


def prompts_to_rank(recipe: Recipe) -> Source:
    """The prompts that a recipe has ranked in its rounds: all of `rounds.prompts`, or of its PPO stage.

    What of them is held out from PPO is held out from the reward model's training too, where its `heldout` is as large.
    """
    assert recipe.ppo is not None
    own = {f.name: getattr(recipe.ppo, f.name) for f in dataclasses.fields(Source)}
    others = (
        {"data": recipe.rounds.prompts, "columns": {}, "convert": None}
        if recipe.rounds is not None and recipe.rounds.prompts
        else {}
    )
    return _all_rows(Source(**own | others))


def draw_samples(
    shared: SharedBase,
    tokenizer: Any,
    prompts: Prepared,
    out: Path,
    settings: SampleSettings,
    batch_size: int = 64,
    limit: int | None = None,
) -> dict[str, int]:
    """What `sample_responses` does once its settings are kept and all is loaded: `shared` has a role for each model."""
    written, left_out = (Journal(path, ["id"]) for path in (out, beside(out, "left_out.jsonl")))
    done = {row["id"] for journal in (written, left_out) for row in journal.rows}
    todo = different_prompts(prompts.train, limit)
    stops = [prompts.stop_token_id]
    sampler = Sampler(shared, tokenizer, settings.response_length, 1.0, batch_size, stops)
    with tqdm(total=len(todo), initial=len(done & dict(todo).keys()), desc="sample", unit="prompt") as bar:
        for start in range(0, len(todo), AT_ONCE):
            # Always the same prompts together, whatever of them is written already: their draws depend on it.
            part = todo[start : start + AT_ONCE]
            if done.issuperset(key for key, _ in part):
                continue
            for (key, row), drawn in zip(part, _responses(sampler, part, start, settings), strict=True):
                if key not in done:
                    (written if len(drawn) > 1 else left_out).append(_sample(key, row, drawn))
                    bar.update()
    short = sum(len(row["responses"]) < settings.k for row in written.rows)
    return {"samples": len(written.rows), "short": short, "left_out": len(left_out.rows)}


def different_prompts(table: Dataset, limit: int | None = None) -> list[tuple[str, Row]]:
    """The first row of each prompt with the prompt's id; with a limit so many of them, in the order of their ids.

    These are hashes, so that few prompts are like all, in whatever order those stand.
    """
    first: dict[str, int] = {}
    for index, prompt in enumerate(table["prompt"]):
        first.setdefault(prompt_id(prompt), index)
    ids = list(first) if limit is None else sorted(first)[:limit]
    return list(zip(ids, table.select([first[key] for key in ids]).to_list(), strict=True))


def keep_sample_settings(
    out: Path, settings: SampleSettings, recipe: Recipe, tokenizer: Any, folders: Mapping[str, Path | None]
) -> None:
    """Write the settings, and what tells the models in their folders from others, beside the samples.

    Raises ValueError for a folder, and where samples of other settings or models are there.
    """
    check_place(out)
    weights = {name: digest(model_identity(recipe.base, tokenizer, folder)) for name, folder in folders.items()}
    now = {**dataclasses.asdict(settings), "weights": weights}
    keep_settings(out, now, "samples", [beside(out, "left_out.jsonl")])


def prompt_id(prompt: Any) -> str:
    """The id of a prompt's samples: a hash of the prompt."""
    return row_id(prompt)


def _responses(
    sampler: Sampler, part: Sequence[tuple[str, Row]], start: int, settings: SampleSettings
) -> list[list[Drawn]]:
    """For each prompt its different responses with their origins, in the order of the slots that they fill."""
    ways = [(name, temperature) for name in settings.models for temperature in settings.temperatures]
    filled: list[dict[int, Drawn]] = [{} for _ in part]  # of each prompt: slot -> response
    for attempt in range(settings.attempts):
        for number, (name, temperature) in enumerate(ways):
            # Which way a prompt begins with goes round, so that all have their share where k is no multiple.
            missing = [
                (index, slot)
                for index in range(len(part))
                for slot in range(settings.k)
                if (start + index + slot) % len(ways) == number and slot not in filled[index]
            ]
            if not missing:
                continue
            sampler.temperature = temperature
            torch.manual_seed(zlib.crc32(f"{settings.seed} {start} {attempt} {number}".encode()))
            samples = sampler.sample(name, [part[index][1]["prompt_ids"] for index, _ in missing])
            origin = {"model": name, "temperature": temperature, "seed": settings.seed, "attempt": attempt}
            for (index, slot), text in zip(
                missing, sampler.texts(samples, not isinstance(part[0][1]["prompt"], str)), strict=True
            ):
                text = text.strip()
                others = [other for other, _ in filled[index].values()]
                if text and not any(alike(text, other, settings.similarity) for other in others):
                    filled[index][slot] = text, origin
    return [[slots[slot] for slot in sorted(slots)] for slots in filled]


def alike(first: str, second: str, similarity: float) -> bool:
    """Whether two responses share at least so much of their words, in order (difflib's ratio)."""
    a, b = first.split(), second.split()
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    return a == b or (matcher.real_quick_ratio() >= similarity and matcher.ratio() >= similarity)


def _sample(key: str, row: Row, drawn: list[Drawn]) -> Row:
    """A sample: the prompt's own columns, and its responses in the prompt's format."""
    conversational = not isinstance(row["prompt"], str)
    texts = [[{"role": "assistant", "content": text}] if conversational else text for text, _ in drawn]
    others = {name: cell for name, cell in row.items() if name not in OURS}
    return {
        **others,
        "id": key,
        "prompt": row["prompt"],
        "responses": texts,
        "origins": [origin for _, origin in drawn],
    }
