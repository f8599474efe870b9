"""A model that answers: on this machine, or behind an OpenAI-compatible endpoint.

Both give the same two things: an answer to messages, and a choice between options, each one letter or word. A local
model's probabilities of the options are exact; an endpoint's come from the likeliest tokens that it reports.
"""

import asyncio
import ipaddress
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from jinja2 import TemplateError
from torch import Tensor
from tqdm.auto import tqdm

from ..data.tokens import (
    Messages,
    completion_token_ids,
    prompt_token_ids,
    render_prompt,
    stop_token_id,
    tokenize_prompt,
)
from ..model.base import load_base, load_tokenizer
from ..model.open import open_models
from ..model.sampler import autocast_of
from ..model.shared import SharedBase
from ..recipe.values import Base
from ..records.folder import adapter_folder, last_model, read_recipe


@dataclass(frozen=True)
class Completion:
    """What a model answered. Where it could not, `text` is None and `error` says why."""

    text: str | None
    prompt_tokens: int | None = None  # None: not reported
    completion_tokens: int | None = None
    ended: bool = True  # by itself, not by the limit of tokens
    error: str | None = None


@dataclass(frozen=True)
class Choice(Completion):
    """A choice between options. `option` is None where the answer could not be understood."""

    option: str | None = None
    probabilities: dict[str, float] | None = None  # of each option, of sum 1; None: not reported
    mass: float | None = None  # what all options together had, before they were brought to sum 1


class NoCompletion(ValueError):
    """The endpoint is gone, refuses the key, or goes on failing after all retries."""


class Client(Protocol):
    """What judges and critics are asked through. `name` is the model's."""

    name: str

    async def chat(self, messages: Messages, max_tokens: int, temperature: float, seed: int) -> Completion:
        """An answer: greedy at temperature 0, else sampled, by a local model the same for the same seed."""
        ...

    async def choose(
        self, messages: Messages, options: Sequence[str], max_tokens: int, temperature: float, seed: int
    ) -> Choice:
        """One of the options, which the messages ask for. A local model needs no tokens for it, only probabilities."""
        ...

    async def close(self) -> None:
        """Close connections."""
        ...


@dataclass(frozen=True)
class ModelSettings:
    """Which model answers, and how it is reached. None stands for a default."""

    model: str  # an endpoint's URL, a Hub id, a local folder, module:function, or a run folder
    model_name: str | None = None  # of an endpoint; the first that it lists
    api_key_env: str | None = None  # of an endpoint: the environment variable with its key; OPENAI_API_KEY
    timeout: float | None = None  # of an endpoint, seconds for one try; 120
    retries: int | None = None  # of an endpoint; 5
    role: str | None = None  # of a run folder: base, sft, ppo, dpo; the last that there is
    quantization: str | None = None  # of a local model: nf4, int8
    chat_template: str | None = None  # of a local model: transcript, chatml, FILE.jinja; its own

    @property
    def is_endpoint(self) -> bool:
        """Whether it is behind a URL."""
        return self.model.startswith(("http://", "https://"))


def connect(settings: ModelSettings) -> Client:
    """The client of an endpoint, or of a local model, which is loaded.

    Raises ValueError where a setting belongs to the other kind, the model or its key is not there, or the endpoint does
    not answer.
    """
    of_endpoints, of_models = ("model_name", "api_key_env", "timeout", "retries"), ("quantization", "chat_template")
    for name in (*of_models, "role") if settings.is_endpoint else of_endpoints:
        if getattr(settings, name) is not None:
            kind = "a local model, and this is an endpoint" if settings.is_endpoint else "an endpoint, and this is none"
            raise ValueError(f"--{name.replace('_', '-')} is for {kind}: {settings.model}.")
    if settings.is_endpoint:
        if (settings.retries or 0) < 0:
            raise ValueError(f"--retries must not be negative, but is {settings.retries}.")
        return Endpoint(settings)
    if (Path(settings.model) / "recipe.json").is_file():
        for name in of_models:
            if getattr(settings, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')}: {settings.model} is a run, whose recipe says that.")
        return _of_run(Path(settings.model), settings.role)
    if settings.role is not None:
        raise ValueError(f"--role is for a run folder, and {settings.model} is none.")
    return _of_base(settings)


def _of_run(run_dir: Path, role: str | None) -> "Local":
    of = read_recipe(run_dir)
    role = role or last_model(run_dir, of)
    shared = open_models(of, {role: adapter_folder(run_dir, of, role)})
    return Local(shared, load_tokenizer(of.base), f"{run_dir.resolve().name}/{role}", role)


def _of_base(settings: ModelSettings) -> "Local":
    base = Base(settings.model, quantization=settings.quantization, chat_template=settings.chat_template)  # type: ignore[arg-type]
    try:
        tokenizer = load_tokenizer(base)
        shared = SharedBase(load_base(base))
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{settings.model} is no URL, run folder or model that can be loaded: {reason}") from error
    return Local(shared, tokenizer, Path(settings.model).name if Path(settings.model).is_dir() else settings.model)


class Local:
    """A role of a shared base. What is asked at the same time goes through the model as one batch."""

    def __init__(self, shared: SharedBase, tokenizer: Any, name: str, role: str = "base") -> None:
        self.shared, self.tokenizer, self.name, self.role = shared, tokenizer, name, role
        self.context = getattr(shared.causal.config.get_text_config(), "max_position_embeddings", None) or math.inf
        self._open: dict[tuple[Any, ...], tuple[list[tuple[Any, ...]], asyncio.Task[list[Any]]]] = {}

    async def chat(self, messages: Messages, max_tokens: int, temperature: float, seed: int) -> Completion:
        try:
            prompt = tokenize_prompt(self.tokenizer, messages)
        except TemplateError as error:  # such as one that has no system message
            return Completion(None, 0, 0, error=f"refused by the chat template: {error}")
        if len(prompt) + max_tokens > self.context:
            return self._too_long(max_tokens)
        return await self._in_batch(("chat", max_tokens, temperature), (prompt, seed))

    async def choose(
        self, messages: Messages, options: Sequence[str], max_tokens: int, temperature: float, seed: int
    ) -> Choice:
        text = render_prompt(self.tokenizer, messages)
        prompt, ways = self._ways(text, options)
        if len(prompt) + max(len(way) for of_option in ways.values() for way in of_option) > self.context:
            return Choice(**vars(self._too_long(1)))
        return await self._in_batch(("choose",), (prompt, ways))

    async def close(self) -> None:
        return None

    def _too_long(self, tokens: int) -> Completion:
        return Completion(None, 0, 0, error=f"with {tokens} tokens of answer longer than the context of {self.context}")

    def _ways(self, text: str, options: Sequence[str]) -> tuple[list[int], dict[str, list[tuple[int, ...]]]]:
        """The prompt's ids, and the ids of each option as it may follow: at once, or after a space."""
        (ids,), stop = prompt_token_ids(self.tokenizer, [text], True), stop_token_id(self.tokenizer, True)
        forms = [space + option for option in options for space in ("", " ")]
        found = completion_token_ids(self.tokenizer, [text] * len(forms), [ids] * len(forms), forms, True, stop)
        ways = iter([tuple(way.tolist()[:-1]) for way in found])
        of_options = {option: sorted({next(ways), next(ways)}) for option in options}
        every = [way for of_option in of_options.values() for way in of_option]
        if self.tokenizer.unk_token_id in {token for way in every for token in way} or len(every) > len(set(every)):
            raise ValueError(f"The tokenizer of {self.name} cannot tell the options {', '.join(options)} apart.")
        return ids.tolist(), of_options

    async def _in_batch(self, kind: tuple[Any, ...], request: tuple[Any, ...]) -> Any:
        """What the model makes of a request, in one batch with all of its kind that are made before it can start."""
        if kind not in self._open:
            self._open[kind] = [], asyncio.create_task(self._run(kind))
        requests, task = self._open[kind]
        requests.append(request)
        return (await task)[requests.index(request)]

    async def _run(self, kind: tuple[Any, ...]) -> list[Any]:
        requests, _ = self._open.pop(kind)
        work = {"chat": self._chat, "choose": self._choose}[kind[0]]
        with self.shared.role(self.role), autocast_of(self.shared):
            return work(requests, *kind[1:])

    def _chat(self, requests: list[tuple[list[int], int]], max_tokens: int, temperature: float) -> list[Completion]:
        draws = [torch.rand(max_tokens, dtype=torch.float64, generator=_generator(seed)) for _, seed in requests]
        stops = [self.tokenizer.eos_token_id, stop_token_id(self.tokenizer, True)]
        found = self.shared.generate(
            *self._pad([prompt for prompt, _ in requests]),
            torch.stack(draws).to(self.shared.device),
            max(temperature, 1e-6),  # at which no other token than the likeliest has a probability
            torch.tensor(stops, device=self.shared.device),
        )
        answers = []
        for (prompt, _), ids in zip(requests, found.tolist(), strict=True):
            end = next((place for place, token in enumerate(ids) if token in stops), None)
            text = self.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
            answers.append(Completion(text, len(prompt), len(ids) if end is None else end + 1, end is not None))
        return answers

    def _choose(self, requests: list[tuple[list[int], dict[str, list[tuple[int, ...]]]]]) -> list[Choice]:
        # Where every option is one token, the prompt alone holds all; else a row for each beginning of an option.
        rows, places = [], []
        for prompt, ways in requests:
            starts = sorted({way[:-1] for of_option in ways.values() for way in of_option}, key=len, reverse=True)
            kept = [s for i, s in enumerate(starts) if not any(t[: len(s)] == s for t in starts[:i])]
            places.append({start: len(rows) + index for index, start in enumerate(kept)})
            rows += [[*prompt, *start] for start in kept]
        longest = max(len(start) for of_request in places for start in of_request) + 1
        with torch.no_grad():
            hidden = self.shared.hidden(*self._pad(rows))[:, -longest:]  # (rows, longest, H)
            log_probs = self.shared.logits(hidden).float().log_softmax(-1).double().cpu()
        choices = []
        for (prompt, ways), of_request in zip(requests, places, strict=True):
            scores = {}
            for option, of_option in ways.items():
                found = []
                for way in of_option:
                    start = next(start for start in of_request if start[: len(way) - 1] == way[:-1])
                    first = log_probs.shape[1] - 1 - len(start)  # the position that predicts the option's first token
                    found.append(log_probs[of_request[start], list(range(first, first + len(way))), list(way)].sum())
                scores[option] = torch.stack(found).logsumexp(0)
            together = torch.stack(list(scores.values()))  # (options,) log-probabilities
            probabilities = dict(zip(scores, together.softmax(0).tolist(), strict=True))
            option = max(probabilities, key=lambda option: probabilities[option])
            mass = together.exp().sum().item()
            choices.append(Choice(option, len(prompt), 1, option=option, probabilities=probabilities, mass=mass))
        return choices

    def _pad(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids (B, P), padded at the left, and their attention mask."""
        width = max(map(len, rows))
        ids = [[self.tokenizer.pad_token_id] * (width - len(row)) + row for row in rows]
        mask = [[False] * (width - len(row)) + [True] * len(row) for row in rows]
        return torch.tensor(ids, device=self.shared.device), torch.tensor(mask, device=self.shared.device)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LOGPROBS = 5  # of the likeliest tokens: what every endpoint that has them allows

# What an endpoint may refuse to be told, and what is said instead.
OPTIONAL = {"logprobs": None, "max_tokens": "max_completion_tokens", "temperature": None, "seed": None}


class Endpoint:
    """A model behind an OpenAI-compatible endpoint. Retries, with backoff, are those of the openai package."""

    def __init__(self, settings: ModelSettings) -> None:
        """Raises ValueError without the package or a key, and where no model is named and none listed."""
        try:
            import openai
        except ImportError as error:
            raise ValueError("Endpoints need the openai package: pip install 'rlhf_recipes[judge]'.") from error
        self._openai, self.url = openai, settings.model.rstrip("/")
        if not urlsplit(self.url).path:
            self.url += "/v1"
        self.retries = 5 if settings.retries is None else settings.retries
        how: dict[str, Any] = {
            "base_url": self.url,
            "api_key": _api_key(self.url, settings.api_key_env),
            "timeout": settings.timeout or 120.0,
            "max_retries": self.retries,
        }
        self.name = settings.model_name or self._first_model(openai.OpenAI(**how))
        self._client = openai.AsyncOpenAI(**how)
        self._refused: set[str] = set()

    def _first_model(self, client: Any) -> str:
        try:
            with client:
                return plain(str(client.models.list().data[0].id))
        except self._openai.OpenAIError as error:
            raise NoCompletion(f"{self._gone(error)} It was asked for its models; --model-name saves that.") from error
        except (AttributeError, IndexError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.url} lists no model: name it with --model-name.") from error

    async def chat(self, messages: Messages, max_tokens: int, temperature: float, seed: int) -> Completion:
        return _read(await self._complete(messages, max_tokens, temperature, seed))

    async def choose(
        self, messages: Messages, options: Sequence[str], max_tokens: int, temperature: float, seed: int
    ) -> Choice:
        found = await self._complete(messages, max_tokens, temperature, seed, logprobs=True)
        answer = _read(found)
        option, at_start = (None, True) if answer.text is None else read_option(answer.text, options)
        mass = None if option is None else _mass(found, options, option, at_start)
        if mass is None or not any(mass.values()):
            return Choice(**vars(answer), option=option)
        total = sum(mass.values())
        probabilities = {name: p / total for name, p in mass.items()}
        return Choice(**vars(answer), option=option, probabilities=probabilities, mass=total)

    async def close(self) -> None:
        await self._client.close()

    async def _complete(
        self, messages: Messages, max_tokens: int, temperature: float, seed: int, logprobs: bool = False
    ) -> Any:
        """The completion, whatever it is, or the error where this one request is refused or its answer is not JSON.

        Raises NoAnswer where no other request would fare better.
        """
        wanted: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
        wanted |= {"seed": seed} if temperature else {}
        wanted |= {"logprobs": True} if logprobs else {}
        while True:
            request = {name: value for name, value in wanted.items() if name not in self._refused}
            request |= {"model": self.name, "messages": messages}
            request |= {OPTIONAL[name]: wanted[name] for name in self._refused & wanted.keys() if OPTIONAL[name]}
            if "logprobs" in request:
                request["top_logprobs"] = LOGPROBS
            try:
                return await self._client.chat.completions.create(**request)
            except (self._openai.BadRequestError, self._openai.UnprocessableEntityError) as error:
                refused = next((name for name in OPTIONAL if name in request and name in str(error)), None)
                if refused is None:
                    return error
                if refused not in self._refused:
                    self._refused.add(refused)
                    instead = f"{OPTIONAL[refused]} is used" if OPTIONAL[refused] else "it is left out"
                    tqdm.write(f"The endpoint refuses {refused}, so {instead}: {plain(str(error))}", file=sys.stderr)
            except json.JSONDecodeError as error:
                return error
            except self._openai.OpenAIError as error:
                raise self._gone(error) from error

    def _gone(self, error: Exception) -> NoCompletion:
        reason = plain(str(error)).rstrip(".") + (f" ({plain(str(error.__cause__))})" if error.__cause__ else "")
        return NoCompletion(f"{self.url} failed, after {self.retries} retries where those help: {reason}.")


def _api_key(url: str, variable: str | None) -> str:
    """The key of an endpoint. One on this machine is sent none unless a variable is named."""
    host = urlsplit(url).hostname or ""
    if variable is None and (host == "localhost" or _is_loopback(host)):
        return "none"
    key = os.environ.get(variable or "OPENAI_API_KEY")
    if not key:
        raise ValueError(
            f"{variable or 'OPENAI_API_KEY'} is not set: put the key of {host} there, or any word where it needs none "
            "(--api-key-env names another variable)."
        )
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def plain(text: str) -> str:
    """A server's words as one short line that a terminal may show."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= 300 else f"{line[:300]}..."


def _read(found: Any) -> Completion:
    """The answer in a completion. What a server got wrong is an answer without text, and an error that says what."""
    if isinstance(found, Exception):
        return Completion(None, 0, 0, error=plain(str(found)))
    try:
        text, reason = found.choices[0].message.content, found.choices[0].finish_reason
    except (AttributeError, IndexError, TypeError):
        return Completion(None, 0, 0, error=f"no completion: {plain(str(found))}")
    usage = getattr(found, "usage", None)
    tokens = (getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None))
    if not isinstance(text, str):
        return Completion(None, *tokens, error="an answer without text")
    return Completion(text, *tokens, ended=reason != "length")


def final_text(text: str) -> str:
    """An answer without what a model thought before it, which is "" where it only thought."""
    return text.rpartition("</think>")[2].strip() if "</think>" in text or "<think>" not in text else ""


LEAD = r"(?i:the|my|final|better|best|preferred|answer|response|option|choice|verdict|one|is|:)"
TAIL = r"(?:[).:\]*-].*| (?i:is (?:the )?(?:better|best|preferred))\b.*)"


def read_option(text: str, options: Sequence[str]) -> tuple[str | None, bool]:
    """The option that an answer names, and whether at its start; None where it names none, or two.

    It must stand alone, in the first line or the last: "B", "**B**", "Answer: B", "The better answer is B.", "B) ...".
    """
    lines = [line.strip() for line in final_text(text).splitlines() if line.strip()]
    pattern = rf"(?:\W*\b{LEAD}\b)*\W*({'|'.join(map(re.escape, options))})(?:\W*|\W*?{TAIL})"
    ends = [re.fullmatch(pattern, line) for line in (*lines[:1], *lines[-1:])]
    found = {match[1] for match in ends if match}
    return (found.pop(), ends[0] is not None) if len(found) == 1 else (None, True)


def _mass(found: Any, options: Sequence[str], option: str, at_start: bool) -> dict[str, float] | None:
    """The probability of each option where the answer names one, among the tokens that the endpoint reports."""
    try:
        places = [token for token in found.choices[0].logprobs.content if _bare(token.token) == option]
        place = places[0 if at_start else -1]
        likely = {token.token: token.logprob for token in (*(place.top_logprobs or ()), place)}
        return {
            name: math.fsum(math.exp(logprob) for token, logprob in likely.items() if _bare(token) == name)
            for name in options
        }
    except (AttributeError, IndexError, TypeError):
        return None


def _bare(token: str) -> str:
    return token.strip(" \n\t*()[].:\"'")
