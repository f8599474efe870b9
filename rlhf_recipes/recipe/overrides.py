"""Recipes: one frozen value says everything a run needs, and a small grammar changes it.

Standard library only, so that importing a recipe costs milliseconds and loads neither torch nor trl.
"""

import ast
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from typing import Any, Literal

from .arguments import objection
from .ranges import check_range
from .values import SECTIONS, Recipe, Stage


def replace(recipe: Recipe, **changes: Any) -> Recipe:
    """`dataclasses.replace`, except that a section also takes a dict of changes.

    `replace(recipe, seed=1, ppo={"kl_coef": 0.1, "limit": 100})` changes two keys of the PPO stage and keeps
    the others. A key that is no field of the stage goes to its `args`. Raises ValueError naming a key that does not
    exist, with the nearest that does, or a value of the wrong type.
    """
    _check_keys("", changes, Recipe)
    for name, change in changes.items():
        _check_text_keys(name, change)
        if name in SECTIONS and isinstance(change, Mapping):
            changes[name] = _replace_section(recipe, name, change)
    result = dataclasses.replace(recipe, **changes)
    check_values(result)
    return result


def _replace_section(recipe: Recipe, name: str, change: Mapping[str, Any]) -> Any:
    section, kind = getattr(recipe, name), SECTIONS[name]
    own = {f.name for f in fields(kind)}
    # JSON, in which a sweep keeps its changes, has made lists of tuples; no section has a list of its own.
    typed: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in change.items() if key in own
    }
    passed = {key: value for key, value in change.items() if key not in own}
    if passed and not issubclass(kind, Stage):
        _check_keys(f"{name}.", change, kind)
    for key in passed:
        if reason := objection(name, key):
            raise ValueError(reason)
    if section is None:
        if "data" in own and "data" not in typed:
            raise ValueError(f"Recipe {recipe.name!r} has no section {name!r}: to add it, set {name}.data as well.")
        section = kind(**{key: typed[key] for key in typed if key == "data"})
    if passed:
        typed["args"] = {**section.args, **typed.get("args", {}), **passed}
    return dataclasses.replace(section, **typed)


def _check_keys(prefix: str, keys: Iterable[str], kind: type) -> None:
    known = [f.name for f in fields(kind)]
    for key in keys:
        if key not in known:
            raise ValueError(f"There is no key {prefix}{key}.{suggestion(key, known)}")


def _check_text_keys(name: str, value: Any) -> None:
    """Raises ValueError for a key that is no text, as those of JSON are, in which a recipe is kept."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{name}: a key is text, not {_shown(key)} ({type(key).__name__}).")
            _check_text_keys(f"{name}.{key}", inner)


def suggestion(word: str, known: Iterable[str]) -> str:
    """` Did you mean x?` for the nearest of `known`, or the whole list where nothing is near and the list is short."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6 if len(known) <= 25 else 0.0)
    return f" Did you mean {near[0]}?" if near else f" Known: {', '.join(sorted(known))}."


def check_values(value: Any, prefix: str = "") -> None:
    """Raises ValueError, naming the key, for a setting of a wrong type or out of its range.

    Of the types of a stage's `args` nothing is known here: see `check_args`.

    Args:
        value: a recipe, or a section of one, whose keys begin with `prefix`.
    """
    for name, annotation in typing.get_type_hints(type(value)).items():
        setting = getattr(value, name)
        check_type(f"{prefix}{name}", setting, annotation)
        if dataclasses.is_dataclass(setting):
            check_values(setting, f"{name}.")
        else:
            check_range(f"{prefix}{name}", setting)
    if isinstance(value, Stage):
        for name, setting in value.args.items():
            check_range(f"{prefix}{name}", setting)


def check_type(key: str, value: Any, annotation: Any) -> None:
    """Raises ValueError, naming `key`, unless `value` fits `annotation`.

    Annotations that it does not know (of classes that are not ours) pass: their own constructor judges those.
    """
    if not _fits(value, annotation):
        raise ValueError(f"{key} must be {_in_words(annotation)}, not {_shown(value)} ({type(value).__name__}).")


def _shown(value: Any) -> str:
    """A value as it would be written, or the beginning of it."""
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _in_words(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_in_words, _without_text(arguments)))
    if origin is Literal or _is_enum(annotation):
        return " or ".join(repr(getattr(word, "value", word)) for word in arguments or annotation)
    plain = isinstance(annotation, type) and origin is None
    return annotation.__name__.replace("NoneType", "None") if plain else str(annotation).replace("typing.", "")


def _is_enum(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Enum)


def _without_text(arguments: Sequence[Any]) -> list[Any]:
    """What a union is of, without `str` where it stands for the words of an enumeration or a dict's JSON."""
    told = any(_is_enum(argument) or dict in (argument, typing.get_origin(argument)) for argument in arguments)
    return [argument for argument in arguments if not (told and argument is str)]


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _fits(value: Any, annotation: Any) -> bool:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in _without_text(arguments))
    if origin is Literal:
        return value in arguments
    if _is_enum(annotation):
        return value in [word.value for word in annotation]
    if annotation is dict or origin is dict:
        return isinstance(value, dict) or (isinstance(value, str) and _is_json_object(value))
    if origin in (tuple, list):
        return isinstance(value, origin) and all(_fits(item, arguments[0]) for item in value)
    if origin is Mapping:
        texts = arguments == (str, str)
        return isinstance(value, origin) and not (texts and any(not isinstance(text, str) for text in value.values()))
    if origin is not None:
        return isinstance(value, origin)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    plain = annotation in (bool, str, type(None)) or dataclasses.is_dataclass(annotation)
    if isinstance(annotation, type) and plain:
        return isinstance(value, annotation)
    return True


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
    """`["ppo.kl_coef=0.1", "seed=1"]` -> `{"ppo": {"kl_coef": 0.1}, "seed": 1}`, as `replace` takes it.

    A value is a Python literal, or true, false or none, or else the bare text.
    """
    changes: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ValueError(f"{word!r} is not a setting. Write key=value, for example ppo.kl_coef=0.1.")
        section, dot, name = key.partition(".")
        if section in changes and isinstance(changes[section], dict) != bool(dot):
            raise ValueError(f"{section} is set as a whole and key by key: keep one of the two.")
        if not dot:
            changes[key] = _keep_text(Recipe, key, text)
        elif section in SECTIONS:
            changes.setdefault(section, {})[name] = _keep_text(SECTIONS[section], name, text)
        else:
            raise ValueError(f"There is no section {section} in {key}.{suggestion(section, SECTIONS)}")
    return changes


def settings(recipe: Recipe) -> list[str]:
    """The resolved recipe as `key=value` lines, each of which `parse_overrides` reads back as the same value."""
    lines = []
    for name, value in vars(recipe).items():
        if name in SECTIONS and value is not None:
            section = dict(vars(value))
            section |= section.pop("args", {})
            lines += _lines(f"{name}.", section)
        else:
            lines += _lines("", {name: value})
    return lines


def differing_settings(recipes: Sequence[Recipe]) -> dict[str, list[str]]:
    """The settings in which recipes differ, with the value of each; "" where one has no such setting.

    Of a section that not all have it is only said who has it.
    """
    columns = [dict(line.split("=", 1) for line in settings(recipe)) for recipe in recipes]
    for section in SECTIONS:
        if any(section in values for values in columns):  # `ppo=None`: this recipe has no such section
            for values in columns:
                for key in [key for key in values if key.startswith(f"{section}.")]:
                    del values[key]
                values.setdefault(section, "set")
    keys = dict.fromkeys(key for values in columns for key in values)
    rows = {key: [values.get(key, "") for values in columns] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _lines(prefix: str, values: Mapping[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        bare = isinstance(value, str) and parse_value(value) == value
        yield f"{prefix}{key}={value if bare else repr(value)}"


def parse_value(text: str) -> Any:
    """A Python literal, true, false or none in any case, or the text itself (`1e-4` is a float, `none` is None)."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        value = ast.literal_eval(text)
        repr(value)  # raises ValueError for a number of thousands of digits, which nothing could write again
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # the last two of what is nested too deep
        return text
    return value


def _keep_text(kind: type, name: str, text: str) -> Any:
    """A field that holds text keeps it, even where it looks like something else (`base.revision=1234567`)."""
    value = parse_value(text)
    annotation = typing.get_type_hints(kind).get(name)
    if text in typing.get_args(annotation):  # `tracker=none`: a word that the field itself knows
        return text
    if isinstance(value, int | float) and not isinstance(value, bool) and annotation in (str, str | None):
        return text
    several = [kind for kind in (annotation, *typing.get_args(annotation)) if typing.get_origin(kind) is tuple]
    if isinstance(value, list) and several:
        return tuple(value)
    if isinstance(value, str | int | float) and annotation in several:
        return (value,)
    return value


def check_args(name: str, stage: Stage, config: type) -> None:
    """Check a stage's `args` against the fields of its TRL config class, before anything is built.

    Args:
        name: the stage's name, for the message.
        config: a dataclass (SFTConfig, RewardConfig, PPOConfig).
    Raises:
        ValueError: an unknown key, with the nearest known one; a value of a wrong type or out of its range; a key that
            no recipe may set.
    """
    known = {f.name: f for f in fields(config) if f.init and not objection(name, f.name)}
    own = {f.name for f in fields(stage)}
    hints = typing.get_type_hints(config)
    for key, value in stage.args.items():
        if reason := objection(name, key):
            raise ValueError(reason)
        if key not in known:
            raise ValueError(f"There is no key {name}.{key}.{suggestion(key, {*known, *own})}")
        check_type(f"{name}.{key}", value, hints[key])
        check_range(f"{name}.{key}", value, known[key].metadata.get("choices"))


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain JSON values."""
    return dataclasses.asdict(recipe)


def from_dict(values: Mapping[str, Any]) -> Recipe:
    """The recipe that `to_dict` wrote. Raises ValueError for a key or a type that no recipe has, or a key it lacks."""
    _check_object("", values, Recipe)
    values = {name: _section(name, value) if name in SECTIONS and value else value for name, value in values.items()}
    recipe = Recipe(**values)
    check_values(recipe)
    try:
        to_dict(recipe)
    except RecursionError as error:
        raise ValueError("It is nested too deep.") from error
    return recipe


def _check_object(prefix: str, values: Any, kind: type) -> None:
    """Raises ValueError unless `values` has keys, those that the dataclass `kind` needs and no others."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix.rstrip('.') or 'A recipe'} must have keys, and is {_shown(values)}.")
    _check_keys(prefix, values, kind)
    for field in fields(kind):
        if field.default is field.default_factory is dataclasses.MISSING and field.name not in values:
            raise ValueError(f"The key {prefix}{field.name} is missing.")


def _section(name: str, values: Mapping[str, Any]) -> Any:
    """A section with its tuples, of which JSON has made lists. A stage's `args` stay as they are."""
    _check_object(f"{name}.", values, SECTIONS[name])
    section = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return SECTIONS[name](**section)
