"""A model that answers, whatever it is: one on this machine (`local`), or one behind an endpoint (`endpoint`).

Both give the same two things: an answer to messages, and a choice between options, each one letter or word. A local
model's probabilities of the options are exact; an endpoint's come from the likeliest tokens that it reports.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..data.tokens import Messages


@dataclass(frozen=True)
class Completion:
    """What a model answered. Where it could not, `text` is None and `error` says why."""

    text: str | None
    prompt_tokens: int | None = None  # None: not reported
    completion_tokens: int | None = None
    ended: bool = True  # by itself, not by the limit of tokens
    error: str | None = None
    lasting: bool = False  # the same question would get the same error again


@dataclass(frozen=True)
class Choice(Completion):
    """A choice between options. `option` is None where the answer could not be understood."""

    option: str | None = None
    probabilities: dict[str, float] | None = None  # of each option, of sum 1; None: not reported
    mass: float | None = None  # what all options together had, before they were brought to sum 1


class NoCompletion(ValueError):
    """The endpoint is gone, refuses the key, or goes on failing after all retries."""


class Client(Protocol):
    """What judges and critics are asked through.

    `name` is the model's, and `identity` (see `model_identity`) tells it from others of that name; of an endpoint's
    nothing is known.
    """

    name: str
    identity: Mapping[str, str | None]

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
    """Which model answers, and how it is reached. None stands for the default that the comment names."""

    model: str  # an endpoint's URL, a Hub id, a local folder, module:function, or a run folder
    model_name: str | None = None  # the model at an endpoint (default: the first that it lists)
    api_key_env: str | None = None  # the variable with the endpoint's key (default: OPENAI_API_KEY, for OpenAI alone)
    timeout: float | None = None  # seconds that an endpoint has for one try (default: 120)
    retries: int | None = None  # further tries at an endpoint (default: 5)
    role: str | None = None  # the model of a run: base, sft, ppo, dpo (default: the last that it has)
    quantization: str | None = None  # nf4 or int8, for a local model (default: none)
    chat_template: str | None = None  # transcript, chatml or FILE.jinja (default: the local model's own)

    @property
    def is_endpoint(self) -> bool:
        """Whether it is behind a URL."""
        return self.model.startswith(("http://", "https://"))


def final_text(text: str) -> str:
    """An answer without what a model thought before it, which is "" where it only thought."""
    return text.rpartition("</think>")[2].strip() if "</think>" in text or "<think>" not in text else ""


def token_count(value: Any) -> int | None:
    """A number of tokens as a server reports it; None where that is none, or more than any text has."""
    return value if type(value) is int and 0 <= value < 1e12 else None


def one_line(text: str) -> str:
    """Words of a model or a server as one short line that a terminal may show."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= 300 else f"{line[:300]}..."
