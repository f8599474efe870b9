"""A model behind an OpenAI-compatible endpoint: how it is asked, and what its answers say."""

import ipaddress
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import SplitResult, urlsplit

from tqdm.auto import tqdm

from ..data.tokens import Messages
from ..recipe.lookup import holds_secret, secret_refused
from .client import Choice, Completion, ModelSettings, NoCompletion, final_text, one_line, token_count

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
        self.identity: Mapping[str, str | None] = {}
        self._openai, self.url = openai, settings.model.rstrip("/")
        key = endpoint_key(self.url, settings.api_key_env)
        if not urlsplit(self.url).path:
            self.url += "/v1"
        self.retries = 5 if settings.retries is None else settings.retries
        reach: dict[str, Any] = {
            "base_url": self.url,
            "api_key": key,
            "timeout": settings.timeout or 120.0,
            "max_retries": self.retries,
        }
        self.name = settings.model_name or self._first_model(openai.OpenAI(**reach))
        self._client = openai.AsyncOpenAI(**reach)
        self._refusals: Counter[str] = Counter()  # of OPTIONAL, the requests that were answered only without

    def _first_model(self, client: Any) -> str:
        """The name of the first model that it lists. Raises ValueError where it lists none."""
        try:
            with client:
                return one_line(str(client.models.list().data[0].id))
        except self._openai.OpenAIError as error:
            raise NoCompletion(f"{self._gone(error)} It was asked for its models; --model-name saves that.") from error
        except (AttributeError, IndexError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{self.url} lists no model: name it with --model-name.") from error

    async def chat(self, messages: Messages, max_tokens: int, temperature: float, seed: int) -> Completion:
        """See `Client.chat`. Raises NoCompletion where no other request would fare better."""
        return _read_completion(await self._complete(messages, max_tokens, temperature, seed))

    async def choose(
        self, messages: Messages, options: Sequence[str], max_tokens: int, temperature: float, seed: int
    ) -> Choice:
        """See `Client.choose`. Raises NoCompletion where no other request would fare better."""
        response = await self._complete(messages, max_tokens, temperature, seed, logprobs=True)
        answer = _read_completion(response)
        option, at_start = (None, True) if answer.text is None else read_option(answer.text, options)
        reported = None if option is None else _reported_probabilities(response, options, option, at_start)
        mass = sum(reported.values()) if reported is not None else 0.0
        if reported is None or not 0 < mass < 1.01:  # none, or no probabilities
            return Choice(**vars(answer), option=option)
        probabilities = {name: p / mass for name, p in reported.items()}
        return Choice(**vars(answer), option=option, probabilities=probabilities, mass=mass)

    async def close(self) -> None:
        """Close its connections."""
        await self._client.close()

    async def _complete(
        self, messages: Messages, max_tokens: int, temperature: float, seed: int, logprobs: bool = False
    ) -> Any:
        """The completion, whatever it is, or the error where this one request is refused or its answer is not JSON.

        Raises NoCompletion where no other request would fare better.
        """
        wanted: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
        wanted |= {"seed": seed} if temperature else {}
        wanted |= {"logprobs": True} if logprobs else {}
        reasons: dict[str, str] = {}  # to leave out what was not left out before
        while True:
            refused = reasons.keys() | {name for name, number in self._refusals.items() if number > 1}
            request = {name: value for name, value in wanted.items() if name not in refused}
            request |= {"model": self.name, "messages": messages}
            request |= {OPTIONAL[name]: wanted[name] for name in refused & wanted.keys() if OPTIONAL[name]}
            if "logprobs" in request:
                request["top_logprobs"] = LOGPROBS
            try:
                response = await self._client.chat.completions.create(**request)
                self._learn(reasons)
                return response
            except (self._openai.BadRequestError, self._openai.UnprocessableEntityError) as error:
                named = error.param or str(error)
                reason = next((name for name in OPTIONAL if name in request and re.search(rf"\b{name}\b", named)), None)
                if reason is None:
                    return error
                reasons[reason] = one_line(str(error))
            except (ValueError, RecursionError) as error:  # of reading it: bytes, numbers or lists that are none
                return error
            except self._openai.OpenAIError as error:
                raise self._gone(error) from error

    def _learn(self, reasons: dict[str, str]) -> None:
        """Leave out of later requests what two were refused for, now that both were answered without.

        Not before: the words of an error may be those of the question, or of an endpoint that was busy for a moment.
        """
        self._refusals.update(reasons.keys())
        for name in (name for name in reasons if self._refusals[name] == 2):
            instead = f"{OPTIONAL[name]} is used" if OPTIONAL[name] else "it is left out"
            tqdm.write(f"The endpoint refuses {name}, so {instead}: {reasons[name]}", file=sys.stderr)

    def _gone(self, error: Exception) -> NoCompletion:
        """What is raised where an error is the endpoint's, and not of one request."""
        reason = one_line(str(error)).rstrip(".") + (f" ({one_line(str(error.__cause__))})" if error.__cause__ else "")
        return NoCompletion(f"{self.url} failed, after {self.retries} retries where those help: {reason}.")


def endpoint_key(url: str, variable: str | None) -> str:
    """The key of an endpoint, from the variable that is named, or OpenAI's own; one on this machine is sent none.

    Raises ValueError where another host's variable is not named: a key goes to nobody else unasked; and where a URL
    holds a secret, or names no host.
    """
    if holds_secret(url):
        raise ValueError(f"{secret_refused(url)} --api-key-env names the variable.")
    if variable == "":  # as of a shell's variable that is not set
        raise ValueError("--api-key-env (in rounds: rounds.api_key_env) is empty: name a variable, or leave it out.")
    parts = _parts_of(url)
    host = parts.hostname or ""
    if variable is None and (host == "localhost" or _is_loopback(host)):
        return "none"
    if variable is None and (parts.scheme, host) != ("https", "api.openai.com"):
        raise ValueError(
            f"{url} needs --api-key-env (in rounds: rounds.api_key_env), the environment variable that holds its key, "
            "or any word where it needs none: OPENAI_API_KEY is for https://api.openai.com alone."
        )
    key = os.environ.get(variable or "OPENAI_API_KEY")
    if not key:
        raise ValueError(
            f"{variable or 'OPENAI_API_KEY'} is not set: put the key of {host} there, or any word where it needs none "
            "(--api-key-env, or rounds.api_key_env, names another variable)."
        )
    return key


def _parts_of(url: str) -> SplitResult:
    """A URL's parts. Raises ValueError, naming it, where it is none that can be asked."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        if re.fullmatch(r"(\d+\.){3}\d+", host):
            ipaddress.ip_address(host)
        if parts.port != 0 and host.encode("idna") and re.fullmatch(r"[!-~]+", url):
            return parts
    except ValueError:  # a port or an address that is none, or brackets; of `encode`, a part that is empty or too long
        pass
    raise ValueError(f"{url!r} is no URL of an endpoint: write http://HOST:PORT/v1, in ASCII and without spaces.")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read_completion(response: Any) -> Completion:
    """The answer in a response. What a server got wrong is an answer without text, and an error that says what."""
    if isinstance(response, Exception):
        return Completion(None, 0, 0, error=one_line(str(response)))
    try:
        text, reason = response.choices[0].message.content, response.choices[0].finish_reason
    except (AttributeError, IndexError, TypeError):
        return Completion(None, 0, 0, error=f"no completion: {one_line(str(response))}")
    usage = getattr(response, "usage", None)
    tokens = (
        token_count(getattr(usage, "prompt_tokens", None)),
        token_count(getattr(usage, "completion_tokens", None)),
    )
    if not isinstance(text, str):
        return Completion(None, *tokens, error="an answer without text")
    return Completion(text, *tokens, ended=reason != "length")


# What may stand before an option in its line, and after it.
LEAD = r"(?i:the|my|final|better|best|preferred|answer|response|option|choice|verdict|one|is)"
TAIL = r"(?:[).:\]*-].*| (?i:is (?:the )?(?:better|best|preferred))\b.*)"


def read_option(text: str, options: Sequence[str]) -> tuple[str | None, bool]:
    """The option that an answer names, and whether at its start; None where it names none, or two.

    It must stand alone, in the first line or the last: "B", "**B**", "Answer: B", "The better answer is B.", "B) ...".
    """
    lines = [line.strip() for line in final_text(text).splitlines() if line.strip()]
    pattern = rf"(?:\W*\b{LEAD}\b)*\W*({'|'.join(map(re.escape, options))})(?:\W*|\W*?{TAIL})"
    ends = [re.fullmatch(pattern, line) for line in (*lines[:1], *lines[-1:])]
    named = {match[1] for match in ends if match}
    return (named.pop(), ends[0] is not None) if len(named) == 1 else (None, True)


def _reported_probabilities(
    response: Any, options: Sequence[str], option: str, at_start: bool
) -> dict[str, float] | None:
    """The probability of each option where the answer names one, among the tokens that the endpoint reports.

    None where it reports none, or in another form.
    """
    try:
        places = [token for token in response.choices[0].logprobs.content if _bare(token.token) == option]
        place = places[0 if at_start else -1]
        likely = {token.token: token.logprob for token in (*(place.top_logprobs or ()), place)}
        return {
            name: math.fsum(math.exp(logprob) for token, logprob in likely.items() if _bare(token) == name)
            for name in options
        }
    except (AttributeError, IndexError, TypeError, OverflowError):
        return None


def _bare(token: str) -> str:
    """A token without what may stand around a letter."""
    return token.strip(" \n\t*()[].:\"'")
