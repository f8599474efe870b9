"""The Hugging Face Hub, which may not answer: then what is in its cache on this machine is used."""

import functools
import sys
from http import HTTPStatus
from pathlib import Path

import datasets
from huggingface_hub import constants, get_session, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import build_hf_headers

TIMEOUT = 10.0  # seconds


def ask_hub(name: str, revision: str | None = None, kind: str = "models") -> str:
    """The name of a model or dataset, after the Hub was asked for it once. A folder of this machine is none of its.

    Where the Hub does not answer, this process goes offline (as by HF_HUB_OFFLINE=1) and says so: the libraries would
    make a hundred requests, and try each again and again. Raises ValueError where a model is not in the cache then.
    """
    if constants.HF_HUB_OFFLINE or Path(name).exists():
        return name
    why = _failure(f"{constants.ENDPOINT}/api/{kind}/{name}")
    if why is not None:
        if kind == "models" and not _is_cached(name, revision):
            raise ValueError(
                f"{name} is no folder, not in the cache, and the Hub does not answer ({why}). Try it later."
            )
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        print(f"warning: the Hub does not answer ({why}). The cache is used, offline from here on.", file=sys.stderr)
    return name


@functools.cache
def _failure(url: str) -> str | None:
    """Why the Hub does not answer; None where it does, if only that it has no such thing."""
    try:
        response = get_session().get(url, headers=build_hf_headers(), timeout=TIMEOUT)
    except Exception as error:  # of httpx, or httpx2, whichever this huggingface_hub has
        return f"{constants.ENDPOINT}: {error}"
    failed = response.is_server_error or response.status_code == HTTPStatus.TOO_MANY_REQUESTS
    return f"{constants.ENDPOINT}: HTTP {response.status_code}" if failed else None


def _is_cached(name: str, revision: str | None) -> bool:
    """Whether a model's configuration is in the cache."""
    try:
        return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    except HFValidationError:
        return False
