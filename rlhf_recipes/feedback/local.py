"""A model on this machine that answers: a bare base, or a model of a run as a role on its base.

Shapes: B rows, P tokens of the longest prompt, H the hidden size, V the vocabulary.
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.tokens import (
    Messages,
    RefusedByTemplate,
    answer_frame,
    completion_token_ids,
    prompt_token_ids,
    quoted,
    render_prompt,
    response_texts,
    stop_token_id,
    tokenize_prompt,
)
from ..model.base import load_base, load_tokenizer
from ..model.batches import TOKENS_AT_ONCE, Batches
from ..model.open import model_identity, open_models
from ..model.sampler import autocast_of
from ..model.shared import SharedBase
from ..recipe.values import Base
from ..records.folder import adapter_folder, last_model, read_recipe
from .client import Choice, Completion, ModelSettings

Tokens = tuple[int, ...]
Spellings = dict[str, list[Tokens]]  # of each option, the ways to write it after a prompt


class LocalModel:
    """A role of a shared base. What is asked at the same time goes through the model together, as far as it fits."""

    def __init__(
        self,
        shared: SharedBase,
        tokenizer: Any,
        name: str,
        role: str = "base",
        identity: Mapping[str, str | None] | None = None,
    ) -> None:
        self.shared, self.tokenizer, self.name, self.role = shared, tokenizer, name, role
        self.identity: Mapping[str, str | None] = identity or {}
        self.batches = Batches(64, "rows at once")
        self.context = getattr(shared.causal.config.get_text_config(), "max_position_embeddings", None) or math.inf
        # The batches that still take requests: kind -> its requests, and the task that will answer them.
        self._open: dict[tuple[Any, ...], tuple[list[tuple[Any, ...]], asyncio.Task[list[Any]]]] = {}

    async def chat(self, messages: Messages, max_tokens: int, temperature: float, seed: int) -> Completion:
        """See `Client.chat`."""
        try:
            prompt = tokenize_prompt(self.tokenizer, self._quoted(messages))
        except RefusedByTemplate as error:  # such as one that has no system message
            return Completion(None, 0, 0, error=f"refused by the chat template: {error.__cause__}", lasting=True)
        if len(prompt) + max_tokens > self.context:
            return self._too_long(max_tokens)
        return await self._in_batch(("chat", max_tokens, temperature), (prompt, seed))

    async def choose(
        self, messages: Messages, options: Sequence[str], max_tokens: int, temperature: float, seed: int
    ) -> Choice:
        """See `Client.choose`. Raises ValueError where the tokenizer cannot tell the options apart."""
        # Where an answer's text begins: after the thought that a template writes. A space belongs to the spellings.
        before = answer_frame(self.tokenizer).before.rstrip(" ")
        prompt, spellings = self._spell(render_prompt(self.tokenizer, self._quoted(messages)) + before, options)
        if len(prompt) + max(map(len, _all_spellings(spellings))) > self.context:
            return Choice(**vars(self._too_long(1)))
        return await self._in_batch(("choose",), (prompt, spellings))

    async def close(self) -> None:
        """Nothing is open."""

    def _quoted(self, messages: Messages) -> Messages:
        """Messages of which none can leave its turn: they hold what others have written."""
        return quoted(self.tokenizer, [messages])[0]

    def _too_long(self, tokens: int) -> Completion:
        error = f"with {tokens} tokens of answer longer than the context of {self.context}"
        return Completion(None, 0, 0, error=error, lasting=True)

    def _spell(self, text: str, options: Sequence[str]) -> tuple[list[int], Spellings]:
        """The prompt's ids, and the ids of each option as it may follow: at once, or after a space."""
        (ids,), stop = prompt_token_ids(self.tokenizer, [text], True), stop_token_id(self.tokenizer, True)
        forms = [space + option for option in options for space in ("", " ")]
        ended = completion_token_ids(self.tokenizer, [text] * len(forms), [ids] * len(forms), forms, True, stop)
        tokens = iter([tuple(form.tolist()[:-1]) for form in ended])
        spellings = {option: sorted({next(tokens), next(tokens)}) for option in options}
        flat = _all_spellings(spellings)
        if self.tokenizer.unk_token_id in {token for tokens in flat for token in tokens} or len(flat) > len(set(flat)):
            raise ValueError(f"The tokenizer of {self.name} cannot tell the options {', '.join(options)} apart.")
        return ids.tolist(), spellings

    async def _in_batch(self, kind: tuple[Any, ...], request: tuple[Any, ...]) -> Any:
        """What the model makes of a request, together with all of its kind that are made before it can start."""
        if kind not in self._open:
            self._open[kind] = [], asyncio.create_task(self._answer_batch(kind))
        requests, task = self._open[kind]
        requests.append(request)
        return (await task)[requests.index(request)]

    async def _answer_batch(self, kind: tuple[Any, ...]) -> list[Any]:
        """The answers to all requests of a kind that have come until now."""
        requests, _ = self._open.pop(kind)
        work = {"chat": self._generate, "choose": self._weigh_options}[kind[0]]
        with self.shared.role(self.role), autocast_of(self.shared):
            return work(requests, *kind[1:])

    def _generate(self, requests: list[tuple[list[int], int]], max_tokens: int, temperature: float) -> list[Completion]:
        """Answers to requests, each a prompt's ids and a seed."""
        draws = [  # (max_tokens,) each
            torch.rand(max_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            for _, seed in requests
        ]
        stops = [self.tokenizer.eos_token_id, stop_token_id(self.tokenizer, True)]
        responses: list[list[int]] = [[]] * len(requests)

        def work(batch: Tensor) -> None:
            sampled = self.shared.generate(  # (rows of the batch, max_tokens)
                *self._pad([requests[row][0] for row in batch.tolist()]),
                torch.stack(draws)[batch].to(self.shared.device),
                max(temperature, 1e-6),  # at which no other token than the likeliest has a probability
                torch.tensor(stops, device=self.shared.device),
            )
            for row, response in zip(batch.tolist(), sampled.tolist(), strict=True):
                responses[row] = response

        self.batches.run(torch.tensor([len(prompt) for prompt, _ in requests]), work, doing="sampling")
        answers = []
        for (prompt, _), ids in zip(requests, responses, strict=True):
            end = next((place for place, token in enumerate(ids) if token in stops), None)
            said = ids if end is None else ids[: end + 1]
            text = response_texts(self.tokenizer, [said], True)[0].strip()
            answers.append(Completion(text, len(prompt), len(said), end is not None))
        return answers

    def _weigh_options(self, requests: list[tuple[list[int], Spellings]]) -> list[Choice]:
        """The likeliest option of each request, a prompt's ids and the options' spellings; all have probabilities."""
        # Where every option is one token, the prompt alone holds all; else a row for each beginning of an option.
        rows: list[list[int]] = []
        rows_by_start: list[dict[Tokens, int]] = []
        for prompt, spellings in requests:
            starts = sorted({tokens[:-1] for tokens in _all_spellings(spellings)}, key=len, reverse=True)
            kept = [s for i, s in enumerate(starts) if not any(t[: len(s)] == s for t in starts[:i])]
            rows_by_start.append({start: len(rows) + index for index, start in enumerate(kept)})
            rows += [[*prompt, *start] for start in kept]
        longest = max(len(start) for row_of_start in rows_by_start for start in row_of_start) + 1
        log_probs = torch.empty(len(rows), longest, self.shared.vocabulary)  # (B, longest, V), on the CPU

        @torch.no_grad()
        def work(batch: Tensor) -> None:
            ids, kept = self._pad([rows[row] for row in batch.tolist()])
            states = self.shared.states(ids, kept).split(kept.sum(1).tolist())  # (l, H) each
            ends = [of_row[-longest:] for of_row in states]
            logits = self.shared.logits(torch.cat(ends)).float()
            for row, found in zip(batch, logits.log_softmax(-1).cpu().split(list(map(len, ends))), strict=True):
                log_probs[row, -len(found) :] = found

        self.batches.run(torch.tensor([len(row) for row in rows]), work, TOKENS_AT_ONCE)
        return [
            _choice(len(prompt), spellings, row_of_start, log_probs)
            for (prompt, spellings), row_of_start in zip(requests, rows_by_start, strict=True)
        ]

    def _pad(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids (B, P), padded at the left, and their attention mask."""
        width = max(map(len, rows))
        ids = [[self.tokenizer.pad_token_id] * (width - len(row)) + row for row in rows]
        mask = [[False] * (width - len(row)) + [True] * len(row) for row in rows]
        return torch.tensor(ids, device=self.shared.device), torch.tensor(mask, device=self.shared.device)


def _all_spellings(spellings: Spellings) -> list[Tokens]:
    return [tokens for ways in spellings.values() for tokens in ways]


def _choice(prompt_tokens: int, spellings: Spellings, row_of_start: dict[Tokens, int], log_probs: Tensor) -> Choice:
    """The likeliest option; an option is as likely as all its spellings together.

    Args:
        row_of_start: of the beginnings of spellings, the row of `log_probs` that ends in it.
        log_probs: (B, longest, V) float32, of the next token at the last positions.
    """
    scores = {}
    for option, ways in spellings.items():
        likely = []
        for tokens in ways:
            start = next(start for start in row_of_start if start[: len(tokens) - 1] == tokens[:-1])
            first = log_probs.shape[1] - 1 - len(start)  # the position that predicts the option's first token
            likely.append(
                log_probs[row_of_start[start], list(range(first, first + len(tokens))), list(tokens)].double().sum()
            )
        scores[option] = torch.stack(likely).logsumexp(0)
    together = torch.stack(list(scores.values()))  # (options,) log-probabilities
    probabilities = dict(zip(scores, together.softmax(0).tolist(), strict=True))
    option = max(probabilities, key=lambda option: probabilities[option])
    mass = together.exp().sum().item()
    return Choice(option, prompt_tokens, 1, option=option, probabilities=probabilities, mass=mass)


def load_run_model(run_dir: Path, role: str | None) -> LocalModel:
    """A model of a run, on its base; None: the last that the run has. Raises ValueError where it has none such."""
    recipe = read_recipe(run_dir)
    role = role or last_model(run_dir, recipe)
    folder, tokenizer = adapter_folder(run_dir, recipe, role), load_tokenizer(recipe.base)
    shared, identity = open_models(recipe, {role: folder}), model_identity(recipe.base, tokenizer, folder)
    return LocalModel(shared, tokenizer, f"{run_dir.resolve().name}/{role}", role, identity)


def bare_base(settings: ModelSettings) -> Base:
    """How a model without adapters is loaded."""
    return Base(settings.model, quantization=settings.quantization, chat_template=settings.chat_template)  # type: ignore[arg-type]


def load_bare_model(settings: ModelSettings) -> LocalModel:
    """A model without adapters, by its Hub id, folder or function. Raises ValueError where it cannot be loaded."""
    base = bare_base(settings)
    try:
        tokenizer = load_tokenizer(base)
        shared, identity = SharedBase(load_base(base)), model_identity(base, tokenizer)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{settings.model} is no URL, run folder or model that can be loaded: {reason}") from error
    name = Path(settings.model).name if Path(settings.model).is_dir() else settings.model
    return LocalModel(shared, tokenizer, name, identity=identity)
