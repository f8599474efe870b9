"""A run's models by name, on the base that they share, and their answers: each is drawn once, and kept by content.

What an answer depends on is its key: the weights of the model and of its base, the prompt, the sample's number, the
seed, the temperature and the length. Neither the batch, nor the other prompts, nor an interruption changes it.

Shapes: B rows of a batch, T tokens of the longest response in it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.tokens import response_texts
from ..model.base import fingerprint, load_base, load_tokenizer
from ..model.batches import TOKENS_AT_ONCE, Batches
from ..model.memory import release
from ..model.open import adapter_digest
from ..model.sampler import Sampler, autocast_of, pad_right
from ..model.shared import SharedBase
from ..recipe.values import Recipe
from ..records.digest import digest
from ..records.files import Journal
from ..records.folder import adapter_folder, read_recipe
from ..stages.reward.adapters import check_probes, check_whole, score_rows

MODEL = "measured"  # the role of the model, or of the reward model, that is measured now


class Cache:
    """Values by key, on disk as soon as they are known."""

    def __init__(self, path: Path) -> None:
        self.journal = Journal(path, ["key", "value"])
        self.values = {str(row["key"]): row["value"] for row in self.journal.rows}

    def fill(
        self, keys: Sequence[str], compute: Callable[[list[int]], list[Any]], label: str | None, at_once: int = 1
    ) -> list[Any]:
        """The values of keys. Those that are not known are computed, `at_once` at a time.

        Args:
            compute: takes places in `keys`, and returns their values.
            label: of the progress bar; None: without one.
        """
        places = {key: place for place, key in enumerate(keys) if key not in self.values}  # a key may be there twice
        missing = list(places.values())
        with tqdm(total=len(missing), desc=label, disable=not missing or label is None) as bar:
            for start in range(0, len(missing), at_once):
                part = missing[start : start + at_once]
                values = {keys[place]: value for place, value in zip(part, compute(part), strict=True)}
                self.journal.append(*({"key": key, "value": value} for key, value in values.items()))
                self.values |= values
                bar.update(len(part))
        return [self.values[key] for key in keys]


@dataclass(frozen=True)
class NamedModel:
    """A model that is measured: an adapter of a run, or the run's bare base."""

    name: str  # as it was asked for
    recipe: Recipe  # of its run
    folder: Path | None  # of its adapter; None: the bare base

    @cached_property
    def weights(self) -> str | None:
        """What tells its adapter from others."""
        return None if self.folder is None else adapter_digest(self.folder)


def find_model(run_dir: Path, recipe: Recipe, name: str) -> NamedModel:
    """The model of a name: of the run as `adapter_folder` knows it, or `PATH/TO/RUN:NAME`.

    Raises ValueError where there is none.
    """
    other_run, colon, name_there = name.rpartition(":")
    if not colon:
        return NamedModel(name, recipe, adapter_folder(run_dir, recipe, name))
    recipe = read_recipe(Path(other_run))
    return NamedModel(name, recipe, adapter_folder(Path(other_run), recipe, name_there))


@dataclass(frozen=True)
class Answer:
    """What a model said to a prompt."""

    key: str
    model: str
    row: int  # of the prompts
    sample: int  # its number among the model's answers to the prompt
    ids: list[int]  # of its own tokenizer, without the prompt's
    ended: bool  # by itself, not by the limit of tokens
    kl: float | None  # nats, to the run's reference, over the whole answer; None: the model has another base
    text: str


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are drawn."""

    seed: int
    response_length: int  # tokens at most
    temperature: float
    stop_token_ids: Sequence[int]  # beside the tokenizer's EOS
    conversational: bool  # whether the prompts are messages
    with_kl: bool = True  # measure the KL to the reference


def _is_answer(value: Any) -> bool:
    """Whether what stands in a cache is an answer, as `Bench.answers` writes it."""
    if not isinstance(value, dict) or value.keys() != {"ids", "ended", "kl"} or not isinstance(value["ids"], list):
        return False
    is_kl = value["kl"] is None or isinstance(value["kl"], int | float)
    return is_kl and isinstance(value["ended"], bool) and all(isinstance(token, int) for token in value["ids"])


class Bench:
    """A base, loaded when it is first needed, with one measured adapter at a time beside the reference.

    All that it measures is kept in its cache, and measured once.
    """

    def __init__(self, recipe: Recipe, cache: Cache, batch_size: int, reference: Path | None = None) -> None:
        """
        Args:
            reference: the adapter to which the KL is measured; None: the bare base.
        """
        self.recipe, self.cache, self.reference = recipe, cache, reference
        self.batches = Batches(batch_size, "--batch-size")
        self.tokenizer = load_tokenizer(recipe.base)
        self.fingerprint = fingerprint(recipe.base, self.tokenizer)
        self.watch: Callable[[Tensor], None] | None = None  # looks on while answers come: see `decode.decode`
        self._held: Path | None = None

    @property
    def batch_size(self) -> int:
        """So many rows at once, at most: fewer than were asked for where memory has run out."""
        return self.batches.size

    @cached_property
    def shared(self) -> SharedBase:
        """The base, with the role `reference`."""
        shared = SharedBase(load_base(self.recipe.base), self.recipe.lora, self.fingerprint)
        shared.add_role("reference", self.reference)
        return shared

    def hold(self, folder: Path | None, head: bool = False) -> str:
        """The role of an adapter, which takes the place of the one before. A reward model's is checked."""
        if folder is None:
            return "base"
        if folder != self._held:
            if head:
                check_whole(folder)
            if self._held is not None:
                self.shared.remove_role(MODEL)
            self.shared.add_role(MODEL, folder, head=head)
            self._held = folder
            if head:
                check_probes(self.shared, folder, MODEL)
        return MODEL

    def sampler(self, response_length: int, temperature: float, stop_token_ids: Sequence[int]) -> Sampler:
        """What samples from the base."""
        sampler = Sampler(self.shared, self.tokenizer, response_length, temperature, self.batch_size, stop_token_ids)
        sampler.watch = self.watch
        sampler.batches = self.batches  # what did not fit once is not tried again
        return sampler

    def answers(
        self,
        model: NamedModel,
        prompts: Sequence[list[int]],
        samples: int,
        settings: AnswerSettings,
        label: str | None = "answers",
    ) -> list[Answer]:
        """A model's answers to prompts (token ids), `samples` of them to each; `label` is of the bar, if any."""
        seed, response_length, temperature = settings.seed, settings.response_length, settings.temperature
        slots = [(row, sample) for row in range(len(prompts)) for sample in range(samples)]
        eos: Any = self.tokenizer.eos_token_id
        stops = sorted({*settings.stop_token_ids, eos})
        reference = adapter_digest(self.reference) if self.reference else None
        sampled_by = [response_length, temperature, stops, reference]
        who = digest(self.fingerprint, model.weights, sampled_by, settings.with_kl)
        keys = [digest("answer", who, seed, sample, prompts[row]) for row, sample in slots]

        def draw(places: list[int]) -> list[dict[str, Any]]:
            role, sampler = self.hold(model.folder), self.sampler(response_length, temperature, stops)
            # The same numbers for every model, so that their differences are the models'.
            wanted = [slots[place] for place in places]
            draws = [uniforms(prompts[row], seed, sample, response_length) for row, sample in wanted]
            drawn = sampler.sample(role, [prompts[row] for row, _ in wanted], torch.stack(draws))
            kl: list[float | None] = [None] * len(places)
            if settings.with_kl:
                # (B, T) each, with zeros after a response's end.
                policy_log_probs, ref_log_probs = (sampler.log_probs(name, drawn)[0] for name in (role, "reference"))
                kl = (policy_log_probs - ref_log_probs).sum(1).tolist()
            columns = zip(drawn.responses(), drawn.ended.tolist(), kl, strict=True)
            return [dict(zip(("ids", "ended", "kl"), row, strict=True)) for row in columns]

        values = self.cache.fill(keys, draw, label and f"{model.name}: {label}", self.batch_size)
        for key, value in zip(keys, values, strict=True):
            if not _is_answer(value):
                raise ValueError(f"{self.cache.journal.path}: the row of the key {key} is no answer. Delete this row.")
        texts = response_texts(self.tokenizer, [value["ids"] for value in values], settings.conversational)
        return [
            Answer(key, model.name, *slot, **value, text=text)
            for key, slot, value, text in zip(keys, slots, values, texts, strict=True)
        ]

    def scores(self, folder: Path, rows: Sequence[list[int]]) -> list[float]:
        """What a reward adapter says of rows of token ids, each prompt + response."""
        keys = [digest("score", self.fingerprint, adapter_digest(folder), row) for row in rows]

        def score(places: list[int]) -> list[float]:
            role = self.hold(folder, head=True)
            return score_rows(self.shared, [rows[place] for place in places], role, self.batches).tolist()

        return self.cache.fill(keys, score, f"{folder.name}: scores", self.batch_size)

    def text_loss(self, model: NamedModel, texts: list[list[int]]) -> float:
        """A model's mean loss on texts (token ids), in nats a token."""
        key = digest("loss", self.fingerprint, model.weights, texts)

        def measure(places: list[int]) -> list[float]:
            role = self.hold(model.folder)
            return [self.sampler(1, 1.0, []).text_loss(role, texts)]

        return self.cache.fill([key], measure, f"{model.name}: perplexity")[0]

    def log_likelihoods(self, contexts: Sequence[list[int]], continuations: Sequence[list[int]]) -> list[float]:
        """The bare base's log-likelihood of each continuation after its context (token ids), in nats."""
        pairs = list(zip(contexts, continuations, strict=True))
        keys = [digest("likelihood", self.fingerprint, *pair) for pair in pairs]

        def measure(places: list[int]) -> list[float]:
            rows = [pairs[place][0] + pairs[place][1] for place in places]
            starts = torch.tensor([len(pairs[place][0]) for place in places])
            found = torch.zeros(len(rows))

            @torch.no_grad()
            def work(batch: Tensor) -> None:
                ids, kept = pad_right([rows[row] for row in batch.tolist()], 0, self.shared.device)  # (B, T)
                continued = torch.arange(1, ids.shape[1]) >= starts[batch, None]  # (B, T - 1)
                mask = kept[:, 1:].bool() & continued.to(self.shared.device)
                found[batch] = self.shared.log_probs(ids, kept, mask)[0].sum(1).cpu()

            with self.shared.role("base"), autocast_of(self.shared):
                self.batches.run(torch.tensor([len(row) for row in rows]), work, TOKENS_AT_ONCE)
            return found.tolist()

        return self.cache.fill(keys, measure, "base: log-likelihoods", self.batch_size)

    def close(self) -> None:
        """Give the base's memory back."""
        vars(self).pop("shared", None)
        self._held = None
        release()


def uniforms(prompt: list[int], seed: int, sample: int, length: int) -> Tensor:
    """The random numbers (length,) from which the answer with this number to a prompt is drawn."""
    generator = torch.Generator().manual_seed(int(digest(prompt, seed, sample)[:15], 16))
    return torch.rand(length, dtype=torch.float64, generator=generator)
