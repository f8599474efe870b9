"""Finding recipes and functions by name."""

import hashlib
import importlib.util
import os
import re
import sys
import types
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from .overrides import suggestion
from .values import Recipe

# Where modules that recipes name stand since 0.2.0: the recipes of older run folders name the old place.
MOVED = {
    "rlhf_recipes.stories": "rlhf_recipes.worlds.stories",
    "rlhf_recipes.tiny": "rlhf_recipes.worlds.tiny",
}


def recipes_folder() -> Path:
    """The folder of the named recipes: inside the package when installed from a wheel, beside it in a clone."""
    inside = Path(__file__).parents[1] / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def recipe_names() -> list[str]:
    """Names of the shipped recipes, as `load` takes them."""
    return sorted(path.stem.replace("_", "-") for path in recipes_folder().glob("*.py") if path.stem != "__init__")


def recipe_file(name: str) -> Path:
    """The file of that recipe, as `load` takes its name. Raises ValueError if no shipped recipe has the name."""
    path = Path(name)
    if path.suffix != ".py":
        path = recipes_folder() / f"{name.replace('-', '_')}.py"
        if not path.is_file():
            raise ValueError(f"There is no recipe {name!r}.{suggestion(name, recipe_names())}")
    return path


def load(name: str) -> Recipe:
    """The recipe of that name (`-` and `_` are the same), or the one in a file of your own (`path/to/my.py`).

    Raises ValueError if there is none, or the file holds no `recipe`.
    """
    path = recipe_file(name)
    recipe = getattr(load_module(path), "recipe", None)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{path} holds no recipe: it must set `recipe = Recipe(...)`.")
    return recipe


def load_module(path: Path) -> types.ModuleType:
    """Import a Python file by its path, without putting it into `sys.modules`."""
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_function(name: str) -> bool:
    """Whether the text names a function (`module:function` or `file.py:function`), not a Hub id or a path."""
    module, colon, function = name.rpartition(":")
    return bool(colon) and function.isidentifier() and len(module) > 1 and not os.path.exists(name)


def function(name: str) -> Callable[..., Any]:
    """The function that `module:function` or `file.py:function` names. Raises ValueError where there is none."""
    module_name, _, function_name = name.rpartition(":")
    if not is_function(name):
        raise ValueError(f"{name!r} names no function. Write module:function or path/to/file.py:function.")
    if module_name.endswith(".py"):
        module = load_module(Path(module_name))
    else:
        try:
            module = importlib.import_module(MOVED.get(module_name, module_name))
        except ModuleNotFoundError as error:
            raise ValueError(f"{name!r}: there is no module {error.name!r}.") from error
    if not hasattr(module, function_name):
        raise ValueError(f"{name!r}: {module_name} has no function {function_name!r}.")
    return getattr(module, function_name)


def code_file(name: str) -> Path | None:
    """The file of a function's module, found without running any code of it; None where it cannot be found so."""
    module = name.rpartition(":")[0]
    if module.endswith(".py"):
        return Path(module) if Path(module).is_file() else None
    module = MOVED.get(module, module)
    if module in sys.modules:
        file = getattr(sys.modules[module], "__file__", None)
        return None if file is None else Path(file)
    parts, places, spec = module.split("."), None, None
    for length in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:length]), places)
        if spec is None:
            return None
        places = spec.submodule_search_locations
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def code_hash(file: Path) -> str:
    """A hash, in hex, of a Python file or, of one in a package, of all files beside it."""
    files = sorted(file.parent.glob("*.py")) if (file.parent / "__init__.py").is_file() else [file]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


# A query's key whose value is a secret: api_key, access-token, X-Amz-Signature, sig; not keyword or monkey.
_SECRET = (
    r"(?i)([?&;](?:[^=&;#]*[-_.])?(?:api|access|secret|private|auth|client|session)?"
    r"(?:key|token|secret|password|passwd|pwd|auth|sig|signature|credentials?)=)[^&;#]+"
)


def holds_secret(text: str) -> bool:
    """Whether a text is a URL, or several of fsspec's in a chain (`::`), with a secret in it.

    That is a user's name or password, or a key or token of its query.
    """
    rests = text.split("://")[1:]
    return any("@" in re.split("[/?#]", rest)[0] or re.search(_SECRET, rest) for rest in rests)


def secret_refused(url: str) -> str:
    """Why such a URL is refused, without the secret."""
    bare = re.sub(_SECRET, r"\1...", re.sub("://[^/?#]*@", "://", url))
    return (
        f"{bare} is given with a name or password, or a key, which files, reports and trackers would hold. Leave it "
        "out, and put it where the client looks for it (~/.netrc, an environment variable)."
    )
