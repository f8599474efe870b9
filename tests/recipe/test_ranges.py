"""Settings out of range or of a wrong type are refused in one line that names the key, before anything is loaded."""

import dataclasses
import inspect
import json
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import trl
from support.command_line import error_of
from support.tiny_models import save_model

from rlhf_recipes import load, replace
from rlhf_recipes.cli.main import main_cli
from rlhf_recipes.data.read import read
from rlhf_recipes.pipeline.check import check_recipe
from rlhf_recipes.plan.skeleton import skeleton
from rlhf_recipes.recipe.arguments import objection
from rlhf_recipes.recipe.overrides import from_dict, parse_overrides, to_dict
from rlhf_recipes.recipe.ranges import LARGEST, LARGEST_WHOLE, RANGES, WORDS, check_range
from rlhf_recipes.recipe.values import SECTIONS, Base, Recipe, Stage
from rlhf_recipes.records.folder import recipe_to_show
from rlhf_recipes.stages.configure import CONFIGS, stage_config

RECIPE = replace(
    load("tiny-rounds"), dpo=load("tiny-dpo").dpo, ptx={"data": "rlhf_recipes.worlds.tiny:pretraining"}, tracker="none"
)
NUMBERS = (int, float, int | None, float | None)
HOSTILE = (math.nan, math.inf, -math.inf, 1e308, -(10**30), 10**30, 10**400)
OWN = [f"{name}.{field.name}" for name, kind in SECTIONS.items() for field in fields(kind)]
PASSED = [f"{name}.{field.name}" for name, kind in CONFIGS.items() for field in fields(kind) if field.init]
KEYS = {field.name for field in fields(Recipe)} | {
    key for key in (*OWN, *PASSED) if objection(*key.split(".")) is None and not key.endswith(".args")
}


def ranged(table: dict[str, Any]) -> list[str]:
    """The settings that a table is about, each with its section."""
    return sorted(key for key in KEYS if key in table or key.rpartition(".")[2] in table)


def written(key: str, value: Any) -> Recipe:
    """The recipe with a value as a file has it, read back."""
    values = json.loads(json.dumps(to_dict(RECIPE)))
    section, dot, name = key.partition(".")
    place = values if not dot else values[section] if name in values[section] else values[section]["args"]
    place[name or section] = value
    return from_dict(json.loads(json.dumps(values)))


def outside(key: str) -> list[float]:
    """Numbers next to the range of a key, of the key's kind."""
    numbers = RANGES.get(key) or RANGES[key.rpartition(".")[2]]
    below, above = math.nextafter(numbers.low, -math.inf), math.nextafter(numbers.high, math.inf)
    whole = [math.ceil(numbers.low) - 1, math.floor(min(numbers.high, LARGEST_WHOLE)) + 1]
    return [below, above, *(number for number in whole if not numbers.low <= number <= numbers.high)]


def test_every_range_is_of_a_setting() -> None:
    for table in (RANGES, WORDS):
        ours = {key for key in table if key in KEYS or key in {name.rpartition(".")[2] for name in KEYS}}
        assert table.keys() - ours <= {"data_seed"}, "of the configuration of a round"


@pytest.mark.parametrize("key", ranged(RANGES))
def test_a_number_out_of_range_is_refused_by_name(key: str) -> None:
    for value in (*outside(key), *HOSTILE):
        given = [value] if key == "rounds.temperatures" else value
        with pytest.raises(ValueError, match=rf"^{re.escape(key)} must be ") as error:
            written(key, given)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=rf"^{re.escape(key)} must be "):
        written(key, "hot")


@pytest.mark.parametrize("key", ranged(WORDS))
def test_a_word_that_is_not_known_is_refused_by_name(key: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(key)} must be one of "):
        check_range(key, ["hot"] if key == "dpo.loss_type" else "hot")


def test_the_losses_of_dpo_are_trls() -> None:
    assert set(WORDS["dpo.loss_type"]) == set(re.findall(r'if loss_type == "(\w+)"', inspect.getsource(trl.DPOTrainer)))
    code = inspect.getsource(trl.DPOTrainer)
    assert set(WORDS["dpo.f_divergence_type"]) == set(re.findall(r'self\.f_divergence_type == "(\w+)"', code))


@pytest.mark.parametrize("key", ["ppo.kl_coef", "ppo.reward_weights", "dpo.f_alpha_divergence_coef", "sft.hot"])
def test_a_number_without_a_range_is_finite(key: str) -> None:
    for value in HOSTILE:
        with pytest.raises(ValueError, match=rf"^{key} must be "):
            check_range(key, [value])
    check_range("ppo.reward_weights", [0.5, -LARGEST, LARGEST_WHOLE])


def test_what_the_libraries_mean_by_none_zero_and_minus_one_is_taken() -> None:
    stage = {"max_steps": -1, "save_total_limit": None, "eval_steps": None, "max_grad_norm": 0, "learning_rate": 0}
    stage |= {"warmup_steps": 0.1, "logging_steps": 0.5, "max_length": None, "pad_to_multiple_of": "auto"}
    stage |= {"gradient_accumulation_steps": "auto", "lr_scheduler_type": "cosine_with_restarts", "optim": "sgd"}
    stage |= {"lr_scheduler_kwargs": '{"num_cycles": 2}', "eval_strategy": "no", "dataloader_prefetch_factor": None}
    ppo = {"gradient_checkpointing": True, "rollout_micro_batch_size": "auto", "total_episodes": None, "max_steps": -1}
    check_recipe(replace(RECIPE, sft=stage, dpo={"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0]}, ppo=ppo))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sft.optim", "adam"),
        ("sft.lr_scheduler_type", 3),
        ("sft.eval_strategy", "never"),
        ("sft.log_level", "loud"),
        ("sft.loss_type", "mse"),
        ("sft.train_sampling_strategy", "hot"),
        ("sft.lr_scheduler_kwargs", "hot"),
        ("sft.columns", {"prompt": 1}),
        ("sft.accelerator_config", True),
        ("sft.accelerator_config", {"hot": 1}),
        ("ppo.reward_weights", ["hot"]),
        ("ppo.kl_coef", [0.1]),
        ("ppo.temperature", {}),
        ("ppo.critic", "hot"),
        ("gold", ""),
        ("rounds.constitution", "nowhere.txt"),
        ("rounds.models", []),
        ("rounds.temperatures", []),
        ("dpo.loss_type", []),
        ("dpo.loss_type", "sigmoid"),
    ],
)
def test_what_is_of_no_right_kind_in_a_file_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}\b") as error:
        check_recipe(written(key, value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"optim": "adamw_torch_xla"}, r"^sft\.optim=adamw_torch_xla, .* cannot be used: Trainer failed to import"),
        ({"optim_args": "hot"}, r"^sft\.optim=.* with its optim_args .* cannot be used"),
        ({"lr_scheduler_kwargs": {"hot": 1}}, r"with lr_scheduler_kwargs=\{'hot': 1\}, cannot be used: .*'hot'"),
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            r"^sft\.lr_scheduler_type=warmup_stable_decay, .*'num_decay_steps'",
        ),
        (
            {"gradient_checkpointing_kwargs": {"hot": 1}},
            r"^sft\.gradient_checkpointing_kwargs .* cannot be used: .*'hot'",
        ),
        ({"dataloader_persistent_workers": True}, r"^sft\.dataloader_num_workers=0, .* persistent_workers"),
        ({"activation_offloading": True}, r"^sft\.activation_offloading takes activations off a GPU"),
        ({"torch_compile_backend": "inductr"}, r"no sft\.torch_compile_backend=inductr\. Did you mean inductor\?"),
    ],
)
def test_what_a_library_would_refuse_later_is_tried_before(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        check_recipe(replace(RECIPE, sft=args))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"loss_type": ["exo_pair"]}, r"^dpo\.loss_type: exo_pair needs dpo\.label_smoothing"),
        ({"loss_type": ["aot"], "use_weighting": True}, r"^dpo\.use_weighting is of pairs"),
        ({"loss_type": ["bco_pair"], "f_divergence_type": "js_divergence"}, r"^dpo\.f_divergence_type=js_divergence "),
    ],
)
def test_losses_that_trl_would_refuse_after_sft_are_refused_before(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_recipe(replace(RECIPE, dpo=args))


def test_a_recipe_that_was_made_by_hand_is_checked_too() -> None:
    lora: Any = dataclasses.replace(RECIPE.lora, r="hot")
    for changes, key in [
        ({"lora": lora}, "lora.r"),
        ({"seed": -1}, "seed"),
        ({"sft": Stage("x", limit=-1)}, "sft.limit"),
    ]:
        with pytest.raises(ValueError, match=f"^{key} must be "):
            check_recipe(dataclasses.replace(RECIPE, **changes))


def test_a_run_folder_with_a_wrong_setting_is_refused_by_its_file(tmp_path: Path) -> None:
    values = json.loads(json.dumps(to_dict(RECIPE)))
    values["ppo"]["args"]["temperature"] = "hot"
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"recipe\.json: ppo\.temperature must be above 0, .*, not 'hot'"):
        recipe_to_show(tmp_path)
    values["ppo"]["args"] |= {"temperature": 1.0, "whiten_rewards": "hot"}  # of a type that only its class knows
    with pytest.raises(ValueError, match=r"^ppo\.whiten_rewards must be bool"):
        stage_config(from_dict(values), "ppo", tmp_path)


@pytest.mark.parametrize(
    "word", ["lora.r=0", "seed=99999999999999999999", "sft.learning_rate=1e400", "rounds.enough=2"]
)
def test_the_command_line_says_it_in_one_line(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"error: {word.partition('=')[0]} must be " in error_of(capsys, ["plan", "tiny-rounds", word])


def test_overrides_are_checked_as_files_are() -> None:
    for word in ("lora.dropout=7", "ppo.temperature=nan", "rounds.temperatures=[0]", "sft.max_steps=-2"):
        with pytest.raises(ValueError, match=f"^{word.partition('=')[0]} must be "):
            replace(RECIPE, **parse_overrides([word]))


@pytest.mark.parametrize("words", [["sample", "x"], ["judge", "x", "--judge", "y"], ["label", "x"], ["evaluate", "x"]])
@pytest.mark.parametrize("seed", ["-1", "9" * 20, "hot"])
def test_a_seed_on_the_command_line_is_one_that_a_recipe_may_have(
    words: list[str], seed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main_cli([*words, f"--seed={seed}"])
    assert exit.value.code == 2
    assert f"'{seed}' is no seed: it must be from 0 to 4,000,000,000" in capsys.readouterr().err


def test_an_attention_that_there_is_not_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    base = Base(str(save_model(tmp_path)), attn_implementation="hot")
    with pytest.raises(ValueError, match=r"^base\.attn_implementation=hot: .* is not supported"):
        skeleton(base)


def test_no_data_is_no_list_index(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^sft\.data is empty: name a file"):
        read("sft", Stage(""))
