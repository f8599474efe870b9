"""What of a run folder may be obeyed. Its recipe can name functions, models with code of their own, and servers.

Who opens a folder that somebody else has made has not asked for any of that. So of a recipe that is read from a folder
only the functions of `rlhf_recipes.worlds` are called, unless the run is the user's own or he says so. Installed
modules are no safer than files: `subprocess:check_output` is a function of one.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ..recipe.lookup import MOVED, is_function
from .cache import cache_folder
from .digest import digest
from .terminal import printable

WORLDS = "rlhf_recipes.worlds"

_said: ContextVar[bool] = ContextVar("said", default=False)


@contextmanager
def trusting(said: bool = True) -> Iterator[None]:
    """A block in which every run folder is obeyed, where the user has said so (`--trust-functions`)."""
    before = _said.set(said)
    try:
        yield
    finally:
        _said.reset(before)


def remember_own(run_dir: Path, values: Mapping[str, Any]) -> None:
    """Keep in the user's cache that this recipe, as `to_dict` gives it, was run by him in this folder."""
    with suppress(OSError):  # a run needs no cache; without one its folder is like a stranger's
        (cache_folder() / "own_runs").mkdir(parents=True, exist_ok=True)
        _own(run_dir, values).touch()


def is_own(run_dir: Path, values: Mapping[str, Any]) -> bool:
    """Whether a recipe, as `to_dict` gives it, was run by the user in this folder."""
    return _own(run_dir, values).is_file()


def _own(run_dir: Path, values: Mapping[str, Any]) -> Path:
    return cache_folder() / "own_runs" / digest(str(run_dir.resolve()), values)


def check_trust(run_dir: Path, values: Mapping[str, Any]) -> None:
    """Raises ValueError where a folder's recipe, as `to_dict` gives it, names what only its owner may have run.

    What is run because the user has said so is printed.
    """
    named = [printable(line) for line in foreign_code(values)]
    if not named or is_own(run_dir, values):
        return
    found = ", ".join(named)
    if not _said.get():
        raise ValueError(
            f"{run_dir} is no run that you made here, and its recipe names code or servers, or a folder of data, which "
            f"may: {found}. Look at them, and add --trust-functions where you trust them (in Python "
            "`with rlhf_recipes.records.trust.trusting():`)."
        )
    print(f"Trusted in {run_dir}: {found}", file=sys.stderr, flush=True)


def foreign_code(values: Any, key: str = "") -> list[str]:
    """`key=value` for each setting of a recipe, as `to_dict` gives it, that has foreign code run or a server asked."""
    if isinstance(values, Mapping):
        return [line for name, value in values.items() for line in foreign_code(value, f"{key}.{name}".lstrip("."))]
    if isinstance(values, list | tuple):
        return [line for value in values for line in foreign_code(value, key)]
    return [f"{key}={values}"] if _is_foreign(key.rpartition(".")[2], values) else []


def _is_foreign(name: str, value: Any) -> bool:
    if name == "trust_remote_code":
        return bool(value)
    if not isinstance(value, str):
        return False
    if name in ("data", "prompts") and Path(value).is_dir():  # `datasets` reads what files and URLs its card names
        return True
    if name == "attn_implementation":  # transformers loads one like org/repository:function from the Hub
        return "/" in value
    return "://" in value or (is_function(value) and not _is_of_worlds(value.rpartition(":")[0]))


def _is_of_worlds(module: str) -> bool:
    """Whether that is a module of this package's worlds, and no file in a folder that is called like them."""
    parts = MOVED.get(module, module).split(".")
    return parts[:2] == WORLDS.split(".") and parts[-1] != "py" and all(part.isidentifier() for part in parts)
