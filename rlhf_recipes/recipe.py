"""Recipes: one frozen value says everything a run needs, and a small grammar changes it.

Standard library only, so that importing a recipe costs milliseconds and loads neither torch nor trl.
"""

import ast
import dataclasses
import difflib
import importlib.util
import json
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

STAGES = ("sft", "reward", "ppo", "dpo")

# Keys of TRL's and transformers' arguments that the runner sets itself: a recipe that set them too would be ignored.
OWNED = {
    "output_dir": "--run-dir says where a run is written",
    "resume_from_checkpoint": "running the same recipe again resumes it",
    "report_to": "set `tracker` of the recipe",
    "run_name": "the tracker's runs are named after the run folder and the stage",
    "project": "set the environment variable WANDB_PROJECT or TRACKIO_PROJECT",
    "seed": "set `seed` of the recipe",
    "data_seed": "set `seed` of the recipe",
    "bf16": "precision is chosen at run time; `base.dtype` sets it",
    "fp16": "precision is chosen at run time; `base.dtype` sets it",
    "use_cpu": "the device is chosen at run time",
    "model_init_kwargs": "the model is described by `base`",
    "trust_remote_code": "set `base.trust_remote_code`",
    "chat_template_path": "set `base.chat_template`",
    "disable_tqdm": "the runner draws the progress bar",
}


@dataclass(frozen=True)
class Base:
    """The frozen model that every role shares.

    `model` is a Hub id, a local folder, or `module:function`, a function that writes a model into the folder that it is
    given (`function(folder: Path) -> None`); its result is kept in the cache and built once.
    """

    model: str  # a Hub id, a local folder, or module:function
    revision: str | None = None  # the Hub model's commit, branch or tag
    quantization: Literal["nf4", "int8"] | None = None  # nf4: 4-bit NormalFloat with double quantization (QLoRA)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: see `model.precision`
    attn_implementation: str | None = None  # None: what transformers chooses
    chat_template: str | None = None  # a name of `data.CHAT_TEMPLATES`, a .jinja file, or None for the tokenizer's own
    trust_remote_code: bool = False  # run code that comes with the model


@dataclass(frozen=True)
class Lora:
    """Shape of every adapter: all roles have the same, because the reward adapter starts as a copy of the SFT one."""

    r: int = 16  # rank
    alpha: int = 32  # the adapter's product is scaled by alpha / r
    dropout: float = 0.0  # while SFT and the reward model train; PPO has none
    target_modules: str | tuple[str, ...] = "all-linear"  # as in PEFT's LoraConfig


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    `data` is a named source (`rlhf-recipes check --sources`), a Hub dataset id, a local JSONL, JSON, CSV or Parquet
    file (also .gz), or `module:function`, a function without arguments that returns rows.

    `convert` brings rows of another format into one that is accepted: a named source's conversion, for a copy of it, or
    `module:function`, which takes all rows and returns rows, best one by one.
    """

    data: str  # a named source, a Hub dataset id, a local file, or module:function
    subset: str | None = None  # the Hub dataset's configuration name
    split: str = "train"  # the Hub dataset's split; a local file is one split
    limit: int | None = None  # read only the first rows
    convert: str | None = None  # a named source's conversion, or module:function, from rows to rows
    columns: Mapping[str, str] = field(default_factory=dict)  # TRL's column name -> the source's
    heldout: float = 0.05  # share of the prompts that are kept from training
    heldout_limit: int = 256  # evaluate on at most so many held-out rows
    bad_rows: Literal["drop", "refuse"] = "drop"  # rows that cannot be used: drop and report them, or stop


@dataclass(frozen=True)
class Stage(Source):
    """One stage: its data, and the arguments of its trainer.

    `args` goes verbatim to SFTConfig, RewardConfig, PPOConfig or DPOConfig.
    """

    args: Mapping[str, Any] = field(default_factory=dict)  # of the trainer


@dataclass(frozen=True)
class PPOStage(Stage):
    """The PPO stage.

    Its reward is the weighted sum (`reward_weights` of PPOConfig) of the sources in `reward_funcs`:

    - `reward`, the shared reward role (an ensemble, if the reward stage trained one); the default where there is one
    - `module:function` or `file.py:function`, a function of TRL's signature, sync or async:
      `function(prompts, completions, completion_ids, **columns) -> list[float]`
    - a Hub id or a folder of a sequence-classification model, which has its own tokenizer and chat template
    """

    reward_funcs: tuple[str, ...] = ()  # sources: reward, module:function, a model; none: reward


@dataclass(frozen=True)
class DPOStage(Stage):
    """The DPO stage. It compares the models on the held-out prompts of `prompts`, or else of its own data."""

    prompts: str | None = None  # a source like `data`


@dataclass(frozen=True)
class Rounds:
    """Rounds of feedback after the first, each in a folder of its own (`round-2`, ...).

    A round samples `responses` to each of `size` fresh prompts from `models`, has them ranked by `labeler`, trains the
    reward model anew on all comparisons so far, and goes on with PPO from the policy of the round before. The SFT model
    stays the reference.

    - `people`: the run stops and says how to label; run again, it goes on once `enough` of the samples are judged
    - `module:function` or `file.py:function`, a simulated labeler:
      `function(prompts, responses, seed) -> list[list[int]]`, a rank for each response, 1 for the best
    - a model (Hub id, folder) or the URL of an OpenAI-compatible endpoint: see `rlhf-recipes judge`
    """

    count: int = 3  # rounds in all; the first has the recipe's own comparisons
    labeler: str = "people"  # people, module:function, or a judge
    prompts: str | None = None  # a source of prompts like `ppo.data`; None: that one
    size: int = 256  # prompts labelled in a round
    responses: int = 4  # to each prompt, 2 to 9
    models: tuple[str, ...] = ("ppo",)  # what is sampled: ppo (of the round before), sft, base
    temperatures: tuple[float, ...] = (1.0,)  # each model answers at each of them in turn
    enough: float = 1.0  # share of the samples that people must have judged or skipped
    weigh_labelers: bool = False  # each by what it is worth: see `rlhf-recipes agreement`
    constitution: str | None = None  # of a judge: a file of principles; None: its own criteria


@dataclass(frozen=True)
class Recipe:
    """Supervised fine-tuning, a reward model, PPO and DPO on one base. A stage that is None is left out.

    `ptx` holds the pretraining texts (rows with `text`) that `ppo.ptx_coef` mixes into PPO. `rounds` asks for more
    feedback after PPO.

    `gold` names a function like those in `PPOStage.reward_funcs`. It measures true quality where that is known, is
    never trained on, and gives the win rate in the final table.

    `variants` makes the recipe a sweep: each name has the changes, as `replace` takes them, that make its recipe of
    this one. Each runs in a run folder of its own inside the sweep's, and what several need alike is trained once.
    """

    name: str  # of the run folder, unless --run-dir is given
    base: Base
    sft: Stage | None = None
    reward: Stage | None = None
    ppo: PPOStage | None = None
    dpo: DPOStage | None = None
    ptx: Source | None = None
    rounds: Rounds | None = None
    lora: Lora = Lora()
    gold: str | None = None  # a reward function that measures true quality
    seed: int = 0  # of weights, data order, held-out split and sampling
    tracker: Literal["wandb", "trackio", "tensorboard", "none"] = "wandb"  # where curves go
    artifacts: bool = False  # give the tracker the adapters of each stage and, at the end, the report
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # name -> changes of this recipe


SECTIONS: dict[str, type] = {
    "base": Base,
    "lora": Lora,
    "sft": Stage,
    "reward": Stage,
    "ppo": PPOStage,
    "dpo": DPOStage,
    "ptx": Source,
    "rounds": Rounds,
}


def replace(recipe: Recipe, **changes: Any) -> Recipe:
    """`dataclasses.replace`, except that a section also takes a dict of changes.

    `replace(recipe, seed=1, ppo={"kl_coef": 0.1, "limit": 100})` changes two keys of the PPO stage and keeps
    the others. A key that is no field of the stage goes to its `args`. Raises ValueError naming a key that does not
    exist, with the nearest that does, or a value of the wrong type.
    """
    _check_keys("", changes, Recipe)
    for name, change in changes.items():
        if name in SECTIONS and isinstance(change, Mapping):
            changes[name] = _replace_section(recipe, name, change)
    result = dataclasses.replace(recipe, **changes)
    _check_types("", result)
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
        if key in OWNED:
            raise ValueError(f"{name}.{key} is set by the runner: {OWNED[key]}.")
    if section is None:
        if "data" in own and "data" not in typed:
            raise ValueError(f"Recipe {recipe.name!r} has no section {name!r}: to add it, set {name}.data as well.")
        section = kind(**{key: typed[key] for key in typed if key == "data"})
    if passed:
        typed["args"] = {**section.args, **typed.get("args", {}), **passed}
    result = dataclasses.replace(section, **typed)
    _check_types(f"{name}.", result)
    return result


def _check_keys(prefix: str, keys: Iterable[str], kind: type) -> None:
    known = [f.name for f in fields(kind)]
    for key in keys:
        if key not in known:
            raise ValueError(f"There is no key {prefix}{key}.{suggestion(key, known)}")


def suggestion(word: str, known: Iterable[str]) -> str:
    """` Did you mean x?` for the nearest of `known`, or the whole list where nothing is near and the list is short."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6 if len(known) <= 25 else 0.0)
    return f" Did you mean {near[0]}?" if near else f" Known: {', '.join(sorted(known))}."


def _check_types(prefix: str, value: Any) -> None:
    for name, annotation in typing.get_type_hints(type(value)).items():
        check_type(f"{prefix}{name}", getattr(value, name), annotation)


def check_type(key: str, value: Any, annotation: Any) -> None:
    """Raises ValueError, naming `key`, unless `value` fits `annotation`.

    Annotations that it does not know (of classes that are not ours) pass: their own constructor judges those.
    """
    if not _fits(value, annotation):
        wanted = (
            getattr(annotation, "__name__", None)
            if isinstance(annotation, type)
            else str(annotation).replace("typing.", "")
        )
        raise ValueError(f"{key} must be {wanted}, not {value!r} ({type(value).__name__}).")


def _fits(value: Any, annotation: Any) -> bool:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
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
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return text


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
        ValueError: an unknown key, with the nearest known one; a value of the wrong type; a key the runner owns.
    """
    known = {f.name for f in fields(config) if f.init} - OWNED.keys()
    own = {f.name for f in fields(stage)}
    hints = typing.get_type_hints(config)
    for key, value in stage.args.items():
        if key in OWNED:
            raise ValueError(f"{name}.{key} is set by the runner: {OWNED[key]}.")
        if key not in known:
            raise ValueError(f"There is no key {name}.{key}.{suggestion(key, known | own)}")
        check_type(f"{name}.{key}", value, hints[key])


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain JSON values."""
    return dataclasses.asdict(recipe)


def from_dict(values: Mapping[str, Any]) -> Recipe:
    """The recipe that `to_dict` wrote. Raises ValueError for a key or a type that no recipe has."""
    _check_keys("", values, Recipe)
    values = {name: _section(name, value) if name in SECTIONS and value else value for name, value in values.items()}
    recipe = Recipe(**values)
    _check_types("", recipe)
    return recipe


def _section(name: str, values: Mapping[str, Any]) -> Any:
    """A section with its tuples, of which JSON has made lists. A stage's `args` stay as they are."""
    _check_keys(f"{name}.", values, SECTIONS[name])
    section = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    result = SECTIONS[name](**section)
    _check_types(f"{name}.", result)
    return result


def of_run(run_dir: Path) -> Recipe:
    """The recipe of a run folder. Raises ValueError where that is none."""
    path = run_dir / "recipe.json"
    if not path.is_file():
        raise ValueError(f"{run_dir} is no run folder: it has no recipe.json. `rlhf-recipes run` writes one.")
    return from_dict(json.loads(path.read_text()))


def recipes_folder() -> Path:
    """The folder of the named recipes: inside the package when installed from a wheel, beside it in a clone."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "recipes"


def names() -> list[str]:
    """Names of the shipped recipes, as `load` takes them."""
    return sorted(path.stem.replace("_", "-") for path in recipes_folder().glob("*.py") if path.stem != "__init__")


def find(name: str) -> Path:
    """The file of that recipe, as `load` takes its name. Raises ValueError if no shipped recipe has the name."""
    path = Path(name)
    if path.suffix != ".py":
        path = recipes_folder() / f"{name.replace('-', '_')}.py"
        if not path.is_file():
            raise ValueError(f"There is no recipe {name!r}.{suggestion(name, names())}")
    return path


def load(name: str) -> Recipe:
    """The recipe of that name (`-` and `_` are the same), or the one in a file of your own (`path/to/my.py`).

    Raises ValueError if there is none, or the file holds no `recipe`.
    """
    path = find(name)
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
    return bool(colon) and function.isidentifier() and len(module) > 1 and not Path(name).exists()


def function(name: str) -> Callable[..., Any]:
    """The function that `module:function` or `file.py:function` names. Raises ValueError where there is none."""
    module_name, _, function_name = name.rpartition(":")
    if not is_function(name):
        raise ValueError(f"{name!r} names no function. Write module:function or path/to/file.py:function.")
    if module_name.endswith(".py"):
        module = load_module(Path(module_name))
    else:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise ValueError(f"{name!r}: there is no module {error.name!r}.") from error
    if not hasattr(module, function_name):
        raise ValueError(f"{name!r}: {module_name} has no function {function_name!r}.")
    return getattr(module, function_name)
