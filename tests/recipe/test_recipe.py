"""Recipes: the override grammar, `replace`, loading by name or path, and that the shipped recipes are inert values."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT

from rlhf_recipes import Base, PPOStage, Recipe, Stage, load, replace
from rlhf_recipes.pipeline.check import check_recipe
from rlhf_recipes.recipe.lookup import function, is_function, recipe_file, recipe_names
from rlhf_recipes.recipe.overrides import check_args, parse_overrides, parse_value, settings
from rlhf_recipes.records.folder import recipe_to_show


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(
        name="example",
        base=Base("some/model"),
        sft=Stage("demonstrations.jsonl", args={"learning_rate": 1e-4}),
        ppo=PPOStage("prompts.jsonl", args={"kl_coef": 0.05, "lam": 0.95}),
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-1", -1),
        ("1e-4", 1e-4),
        ("1_000", 1000),
        (".5", 0.5),
        ("true", True),
        ("False", False),
        ("none", None),
        ("None", None),
        ("cosine", "cosine"),
        ("Qwen/Qwen3-0.6B-Base", "Qwen/Qwen3-0.6B-Base"),
        ("data/a b.jsonl", "data/a b.jsonl"),
        ("'1'", "1"),
        ("''", ""),
        ("", ""),
        ("[1, 2]", [1, 2]),
        ("{'min_lr_rate': 0.1}", {"min_lr_rate": 0.1}),
        ("{{}}", "{{}}"),
        ("a=b", "a=b"),
        ("007", "007"),
    ],
)
def test_a_value_is_a_literal_a_word_or_text(text: str, value: object) -> None:
    parsed = parse_value(text)
    assert parsed == value and type(parsed) is type(value)


def test_overrides_reach_their_places(recipe: Recipe) -> None:
    words = [
        "ppo.kl_coef=0.1",
        "ppo.limit=10",
        "ppo.reward_weights=[1.0]",
        "seed=3",
        "ppo.kl_coef=0.2",
        "sft.optim_args=a=b",
    ]
    changed = replace(recipe, **parse_overrides(words))
    assert changed.ppo is not None and changed.sft is not None
    assert (changed.ppo.args["kl_coef"], changed.ppo.limit, changed.seed) == (0.2, 10, 3)
    assert changed.sft.args["optim_args"] == "a=b", "only the first equals sign divides"
    assert changed.ppo.args["reward_weights"] == [1.0], "a list stays one where the trainer wants a list"
    assert changed.ppo.args["lam"] == 0.95, "what is not named is kept"


def test_text_fields_keep_text(recipe: Recipe) -> None:
    words = ["base.revision=1234567", "name=2026", "tracker=none", "ppo.reward_funcs=a:f", "base.quantization=none"]
    changed = replace(recipe, **parse_overrides(words))
    assert (changed.base.revision, changed.name, changed.tracker) == ("1234567", "2026", "none")
    assert changed.ppo is not None and changed.ppo.reward_funcs == ("a:f",)
    assert changed.base.quantization is None
    assert replace(recipe, **parse_overrides(["lora.target_modules=q_proj"])).lora.target_modules == "q_proj"
    assert replace(recipe, **parse_overrides(["lora.target_modules=['q','k']"])).lora.target_modules == ("q", "k")


def test_a_stage_is_added_and_left_out(recipe: Recipe) -> None:
    added = replace(recipe, **parse_overrides(["reward.data=pairs.jsonl", "reward.learning_rate=1e-5"]))
    assert added.reward == Stage("pairs.jsonl", args={"learning_rate": 1e-5})
    assert replace(recipe, **parse_overrides(["ppo=none"])).ppo is None


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("ppo.kl_coef", ["'ppo.kl_coef'", "key=value"]),
        ("=3", ["'=3'", "key=value"]),
        ("sede=1", ["no key sede", "Did you mean seed?"]),
        ("pp.kl_coef=1", ["no section pp", "Did you mean ppo?"]),
        ("base.modle=x", ["no key base.modle", "Did you mean model?"]),
        ("lora.rank=8", ["no key lora.rank", "alpha, dropout, r, target_modules"]),
        ("seed=abc", ["seed must be int", "'abc'"]),
        ("seed=true", ["seed must be int"]),
        ("lora.r=1.5", ["lora.r must be int", "1.5"]),
        ("ppo.limit=many", ["ppo.limit must be int or None", "'many'"]),
        ("ppo.heldout=a", ["ppo.heldout must be float"]),
        ("sft.columns=prompt", ["sft.columns must be", "Mapping"]),
        ("base.quantization=int4", ["base.quantization must be", "nf4", "int8", "'int4'"]),
        ("base.split=layer", ["base.split must be", "'layers' or 'shards' or None", "'layer'"]),
        ("base.trust_remote_code=1", ["base.trust_remote_code must be bool"]),
        ("tracker=mlflow", ["tracker must be", "wandb", "'mlflow'"]),
        ("base=none", ["base must be"]),
        ("sft=5", ["sft must be"]),
        ("ppo.output_dir=x", ["ppo.output_dir", "--run-dir"]),
        ("sft.seed=1", ["sft.seed", "`seed` of the recipe"]),
        ("sft.dataset_text_field=foo", ["sft.dataset_text_field cannot be set", "map columns with sft.columns"]),
        ("dpo.padding_free=true", ["dpo.padding_free cannot be set", "TRL has switched it off"]),
        ("ppo.per_device_eval_batch_size=8", ["ppo.per_device_eval_batch_size", "set ppo.rollout_micro_batch_size"]),
        ("ppo.dataloader_drop_last=false", ["ppo.dataloader_drop_last cannot be set", "a whole rollout's prompts"]),
        ("ppo={0: 1}", ["ppo: a key is text, not 0 (int)"]),
        ("variants={'a': {2: 3}}", ["variants.a: a key is text, not 2 (int)"]),
        ("ppo.generation_kwargs={None: 1}", ["ppo.generation_kwargs: a key is text"]),
        ("reward.learning_rate=1", ["no section 'reward'", "reward.data"]),
    ],
)
def test_a_wrong_override_names_its_key_and_the_fix(recipe: Recipe, word: str, parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        replace(recipe, **parse_overrides([word]))
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words", [["ppo=none", "ppo.kl_coef=1"], ["ppo.kl_coef=1", "ppo=none"]])
def test_a_section_is_not_set_twice_over(words: list[str]) -> None:
    with pytest.raises(ValueError, match="ppo is set as a whole and key by key"):
        parse_overrides(words)


def test_replace_leaves_the_original_alone(recipe: Recipe) -> None:
    before = settings(recipe)
    changed = replace(recipe, seed=1, ppo={"kl_coef": 1.0, "limit": 5, "columns": {"prompt": "q"}}, base={"model": "b"})
    assert settings(recipe) == before and changed != recipe
    assert changed.ppo is not None and recipe.ppo is not None and changed.ppo.args is not recipe.ppo.args
    assert replace(recipe) == recipe


@pytest.mark.parametrize("value", ["name", "seed"])
def test_recipes_are_frozen(recipe: Recipe, value: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(recipe, value, "other")
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.base.model = "other"  # type: ignore[misc]


def test_settings_are_read_back_as_the_same_recipe(recipe: Recipe) -> None:
    odd = replace(
        recipe,
        tracker="none",
        base={"revision": "12", "chat_template": "none"},
        lora={"target_modules": ("q_proj",)},
        sft={"columns": {"prompt": "a b"}, "optim": "1", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    )
    for one in [odd, *map(load, recipe_names())]:
        blank = Recipe(name="", base=Base(""))
        assert replace(blank, **parse_overrides(settings(one))) == one


@dataclasses.dataclass
class Config:
    """Stands where TRL's configs do."""

    learning_rate: float = 1e-5
    loss_weights: list[float] | None = None
    output_dir: str | None = None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"learning_rat": 1}, "no key sft.learning_rat. Did you mean learning_rate?"),
        ({"limt": 1}, "no key sft.limt. Did you mean limit?"),
        ({"learning_rate": "fast"}, "sft.learning_rate must be float, not 'fast'"),
        ({"loss_weights": 3}, "sft.loss_weights must be"),
        ({"output_dir": "x"}, "sft.output_dir is set by the runner"),
        ({"fsdp": True}, "sft.fsdp cannot be set: each process has the whole model"),
        ({"packing_strategy": "wrapped"}, "sft.packing_strategy cannot be set: packing keeps rows whole"),
    ],
)
def test_args_are_checked_against_the_config(args: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_args("sft", Stage("data.jsonl", args=args), Config)
    check_args("sft", Stage("data.jsonl", args={"learning_rate": 1, "loss_weights": [1.0]}), Config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "list, which is not what this package writes"),
        ({"base": {"model": "m"}}, "The key name is missing"),
        ({"name": "n", "base": [["model"]]}, r"base must have keys, and is \[\['model'\]\]"),
        ({"name": "n", "base": {"dtype": "auto"}}, r"The key base\.model is missing"),
        ({"name": "n", "base": {"model": "m"}, "seed": "1" * 5_000}, r"seed must be int, not '1{299}\.\.\. \(str\)"),
        (
            {"name": "n", "base": {"model": "m"}, "variants": {"a": {"b": json.loads("[" * 900 + "]" * 900)}}},
            "too deep",
        ),
    ],
)
def test_a_damaged_recipe_is_refused_in_words(tmp_path: Path, values: Any, message: str) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"recipe.json: .*{message}"):
        recipe_to_show(tmp_path)


def test_a_number_that_nothing_can_write_is_text() -> None:
    assert parse_value("0x" + "f" * 5_000) == "0x" + "f" * 5_000


def test_load_takes_dashes_underscores_and_paths(tmp_path: Path) -> None:
    assert load("mistral-7b-hh") == load("mistral_7b_hh") == load(str(ROOT / "recipes" / "mistral_7b_hh.py"))
    assert "mistral-7b-hh" in recipe_names() and recipe_file("mistral-7b-hh").is_file()
    (tmp_path / "mine.py").write_text(
        "from rlhf_recipes import load, replace\nrecipe = replace(load('mistral-7b-hh'), name='mine', seed=7)\n"
    )
    assert load(str(tmp_path / "mine.py")).seed == 7
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match=r"empty\.py holds no recipe"):
        load(str(tmp_path / "empty.py"))
    with pytest.raises(ValueError, match="There is no file"):
        load(str(tmp_path / "absent.py"))
    with pytest.raises(ValueError, match=r"no recipe 'mistral-7b'\. Did you mean mistral-7b-hh"):
        load("mistral-7b")


def test_functions_are_named_by_module_or_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def score():\n    return 1\n")
    assert function(f"{tmp_path / 'mine.py'}:score")() == 1
    assert function("os.path:join") is os.path.join
    assert not is_function("Anthropic/hh-rlhf") and not is_function("data.jsonl")
    for name, message in {
        "nothing": "names no function",
        "no_such_module:f": "no module 'no_such_module'",
        "os:no_such_function": "no function 'no_such_function'",
        "absent.py:f": "no file absent.py",
    }.items():
        with pytest.raises(ValueError, match=message):
            function(name)


@pytest.mark.parametrize("name", ["tiny:gold", "stories:ends_well"])
def test_an_older_runs_names_of_functions_are_still_known(name: str) -> None:
    assert function(f"rlhf_recipes.{name}") is function(f"rlhf_recipes.worlds.{name}")


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_inert_and_complete(name: str) -> None:
    recipe = load(name)
    assert recipe.name == name and recipe == load(name)
    docstring = recipe_file(name).read_text().split('"""')[1]
    assert f"rlhf-recipes run {name}" in docstring and "Hardware" in docstring

    check_recipe(recipe)


def test_hh_batches_are_the_papers() -> None:
    for name in ("qwen3-0-6b-hh", "mistral-7b-hh"):
        recipe = load(name)
        assert recipe.sft is not None and recipe.reward is not None and recipe.ppo is not None
        batch = {
            stage: args["per_device_train_batch_size"] * args["gradient_accumulation_steps"]
            for stage, args in (("sft", recipe.sft.args), ("reward", recipe.reward.args))
        }
        assert batch == {"sft": 32 if name.startswith("qwen") else 16, "reward": 64}
        assert recipe.ppo.args["mini_batch_size"] == 64
        rollout = 64 * recipe.ppo.args["num_mini_batches"]
        assert rollout == 512 and recipe.ppo.limit is not None and recipe.ppo.limit % rollout == 0
        longest = recipe.ppo.args["max_prompt_length"] + recipe.ppo.args["response_length"]
        assert longest == recipe.reward.args["max_length"] == recipe.sft.args["max_length"]


def test_loading_every_recipe_is_fast_and_imports_no_torch() -> None:
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from rlhf_recipes.recipe.lookup import load, recipe_names\n"
        "[load(name) for name in recipe_names()]\n"
        "print(time.perf_counter() - start, *{'torch', 'trl', 'transformers', 'peft', 'numpy'} & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    seconds, *imported = run.stdout.split()
    assert not imported
    assert float(seconds) < 0.5  # measured 0.03 s; the margin is for a busy machine
