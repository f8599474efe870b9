"""What is wrong with a recipe, found before anything is loaded."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..data.hub import ask_hub
from ..feedback.client import ModelSettings
from ..feedback.constitution import read_constitution
from ..feedback.endpoint import endpoint_key
from ..feedback.judge import JudgeSettings
from ..feedback.ledger import Prices
from ..feedback.sample import SampleSettings
from ..recipe.lookup import function, holds_secret, is_function, secret_refused
from ..recipe.overrides import to_dict
from ..recipe.values import PEOPLE, Recipe
from ..records import tracking
from ..stages.configure import Configs, configure
from ..stages.scores import ROLE


def check_recipe(recipe: Recipe, run_dir: Path = Path("runs")) -> Configs:
    """Find what is wrong with a recipe before anything is loaded. Returns each stage's TRL configuration.

    Raises ValueError naming the key and the nearest right one.
    """
    check_secrets(to_dict(recipe))
    check_launcher()
    tracking.check_tracker(recipe)
    configs = configure(recipe, run_dir)
    if recipe.rounds is not None:
        check_rounds(recipe)
    if recipe.gold is not None:
        try:
            function(recipe.gold)
        except ValueError as error:
            raise ValueError(f"gold: {error}") from error
    return configs


def check_launcher() -> None:
    """Raises ValueError where accelerate is told to shard the model: it finds one process, and would share nothing."""
    for engine in ("DEEPSPEED", "FSDP"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() in ("true", "1"):
            raise ValueError(
                f"ACCELERATE_USE_{engine} is set, as by `accelerate launch`: it would save no memory, because each "
                "process has the whole base here. Start the run with --processes or torchrun instead."
            )


def check_secrets(values: Any, key: str = "") -> None:
    """Raises ValueError, naming the key, where a recipe, as `to_dict` gives it, has a URL with a secret in it."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            check_secrets(value, f"{key}.{name}".lstrip("."))
    elif isinstance(values, list | tuple):
        for value in values:
            check_secrets(value, key)
    elif isinstance(values, str) and holds_secret(values):
        raise ValueError(f"{key}: {secret_refused(values)}")


SAMPLED_MODELS = ("base", "sft", "ppo")


def check_rounds(recipe: Recipe) -> None:
    """Raises ValueError for rounds that the recipe cannot have."""
    rounds = recipe.rounds
    assert rounds is not None
    if recipe.reward is None or recipe.ppo is None or ROLE not in recipe.ppo.reward_sources:
        raise ValueError("rounds needs a reward stage and a ppo stage whose reward it is: its labels train that one.")
    for name in rounds.models:
        if name not in SAMPLED_MODELS:
            example = "rounds.models=('sft','ppo')"
            raise ValueError(f"rounds.models may have {', '.join(SAMPLED_MODELS)}, as in {example}, and not {name!r}.")
    try:
        SampleSettings(rounds.models, rounds.temperatures, rounds.responses)
    except ValueError as error:
        raise ValueError(f"rounds.{error}") from error
    _check_labeler(rounds.labeler, rounds.api_key_env)
    judge_settings(recipe)
    judge_prices(recipe)
    if rounds.weigh_labelers and importlib.util.find_spec("crowdkit") is None:
        raise ValueError("rounds.weigh_labelers needs packages: pip install 'rlhf_recipes[label]'.")


def _check_labeler(labeler: str, api_key_env: str | None) -> None:
    """Raises ValueError, before anything is trained, for a labeler that there is not."""
    if is_function(labeler):
        function(labeler)
    elif ModelSettings(labeler).is_endpoint:
        if importlib.util.find_spec("openai") is None:
            raise ValueError("rounds.labeler is an endpoint, which needs a package: pip install 'rlhf_recipes[judge]'.")
        endpoint_key(labeler, api_key_env)
    elif labeler != PEOPLE and not (Path(labeler) / "recipe.json").is_file():
        try:
            AutoConfig.from_pretrained(ask_hub(labeler), trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"rounds.labeler: {labeler!r} is not {PEOPLE!r}, no function (module:function or file.py:function), "
                f"URL, run folder or model that can be loaded: {str(error).splitlines()[0]}"
            ) from error


def judge_settings(recipe: Recipe) -> JudgeSettings:
    """How a judge judges: by its own criteria, or by the principles of `rounds.constitution`."""
    rounds = recipe.rounds
    assert rounds is not None
    if rounds.constitution is None:
        return JudgeSettings(seed=recipe.seed)
    try:
        principles = read_constitution(Path(rounds.constitution), needs_principle=True)
    except ValueError as error:
        raise ValueError(f"rounds.constitution: {error}") from error
    return JudgeSettings(tuple(principles), seed=recipe.seed)


def judge_prices(recipe: Recipe) -> Prices:
    """What a round's judge may cost. Raises ValueError for prices that there cannot be."""
    assert recipe.rounds is not None
    return Prices(recipe.rounds.price_in, recipe.rounds.price_out, recipe.rounds.max_cost)
