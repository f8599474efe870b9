"""Every option of PPOConfig changes what it says it does, and no wrong value is taken."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.paths import ROOT
from support.ppo import (
    PROMPTS,
    TEXTS,
    Make,
    add_reward_role,
    after_one_update,
    ppo_config,
    rows_of,
    shared_base,
)
from torch import Tensor
from transformers import TrainingArguments

from rlhf_recipes.model.base import load_tokenizer
from rlhf_recipes.recipe.values import Base, PPOStage, Recipe
from rlhf_recipes.stages.inputs import prepare_stage
from rlhf_recipes.stages.options import PPOConfig
from rlhf_recipes.stages.ppo.trainer import check_fit

# --- Options ----------------------------------------------------------------------------------------------------------


BOTH = {"policy", "critic"}


# option -> a value, what both runs have beside it, and the roles that it changes
EFFECTS: dict[str, tuple[Any, dict[str, Any], set[str]]] = {
    "learning_rate": (0.05, {}, BOTH),
    "critic_learning_rate": (0.01, {}, {"critic"}),
    "num_ppo_epochs": (3, {}, BOTH),
    "num_mini_batches": (2, {}, BOTH),
    "response_length": (3, {}, BOTH),
    "temperature": (0.5, {}, BOTH),
    "stop_token_id": (33, {"stop_token_ids": (), "response_length": 30}, BOTH),
    "num_generations": (2, {}, BOTH),
    "mini_batch_size": (3, {}, BOTH),
    "generation_backend": ("generate", {}, BOTH),
    "reward_weights": ([2.0], {}, BOTH),
    "reward_normalization": ("sft", {}, BOTH),
    "reward_clip": (0.05, {}, BOTH),
    "missing_eos_penalty": (1.0, {"stop_token_ids": ()}, BOTH),
    "length_penalty": (0.1, {}, BOTH),
    "whiten_rewards": (True, {}, BOTH),
    "kl_coef": (0.5, {}, BOTH),
    "kl_estimator": ("k3", {}, BOTH),
    "target_kl": (0.01, {"kl_horizon": 100, "total_episodes": 12}, BOTH),
    "kl_horizon": (100, {"target_kl": 0.01, "total_episodes": 12}, BOTH),
    "max_kl": (1e-3, {}, BOTH),
    "advantage_estimator": ("reinforce++", {}, BOTH),
    "gamma": (0.9, {}, BOTH),
    "lam": (0.5, {}, BOTH),
    "cliprange": (1e-4, {}, {"policy"}),
    "critic_warmup_steps": (1, {}, {"policy"}),
    "cliprange_value": (1e-4, {}, {"critic"}),
    "vf_coef": (0.5, {}, {"critic"}),
    "ptx_coef": (1.0, {"ptx": TEXTS}, {"policy"}),
    "ptx_batch_size": (1, {"ptx": TEXTS, "ptx_coef": 1.0}, {"policy"}),
    "ptx_max_length": (3, {"ptx": TEXTS, "ptx_coef": 1.0}, {"policy"}),
}


# Options that show elsewhere than in the weights after an update, with the test that shows it.
SHOWN_BY = {
    "logging_steps": "test_logging_steps_count_updates",
    "gradient_checkpointing": "test_gradient_checkpointing_changes_no_update",
    "total_episodes": "test_total_episodes_count_prompts_and_may_repeat_them",
    "rollout_micro_batch_size": "test_the_batch_size_changes_no_sample",
    "vllm_gpu_memory_utilization": "test_vllm_samples_as_the_model_does",
    "vllm_enable_sleep_mode": "test_vllm_samples_as_the_model_does",
    "whole_rollout_rewards": "test_every_estimator_and_critic_is_the_same_in_several_processes",
    "reward_timeout": "test_a_reward_function_that_hangs_ends_the_run_in_time",
    "on_nonfinite": "test_steps_that_are_not_finite_can_be_left_out",
    "max_prompt_length": "test_longer_prompts_than_max_prompt_length_are_bad_rows",
    "ensemble_aggregation": "test_an_ensemble_changes_the_score",
    "uncertainty_coef": "test_an_ensemble_changes_the_score",
    "critic": "test_a_critic_starts_where_it_is_told",
    "ema_decay": "test_the_moving_average_is_what_is_evaluated",
    "early_stopping_patience": "test_training_stops_after_so_many_evaluations_without_a_better_one",
}


def test_no_option_of_ours_is_without_effect() -> None:
    inherited = {f.name: f.default for f in fields(TrainingArguments)}
    ours = {f.name for f in fields(PPOConfig) if inherited.get(f.name, ...) != f.default}
    assert ours == EFFECTS.keys() | SHOWN_BY.keys() and not EFFECTS.keys() & SHOWN_BY.keys()
    tests = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    for name in SHOWN_BY.values():
        assert any(f"\ndef {name}(" in text for text in tests)


@pytest.fixture(scope="module")
def defaults() -> dict[str, dict[str, Tensor]]:
    """The weights without an option, by what both runs have beside it: many options have the same."""
    return {}


@pytest.mark.parametrize("option", EFFECTS)
def test_an_option_changes_the_roles_that_it_is_about(
    folder: Path, make: Make, defaults: dict[str, dict[str, Tensor]], option: str
) -> None:
    value, beside, changed = EFFECTS[option]
    if repr(beside) not in defaults:
        defaults[repr(beside)] = after_one_update(folder, make, beside)
    default = defaults[repr(beside)]
    other = after_one_update(folder, make, {**beside, option: value})
    assert {role for role in default if (default[role] - other[role]).abs().max() > 1e-7} == changed


def test_logging_steps_count_updates(make: Make) -> None:
    trainer = make(total_episodes=24, logging_steps=3, response_length=1)
    trainer.train()
    assert [row["episode"] for row in trainer.state.log_history if "episode" in row] == [12, 24]


def test_an_ensemble_changes_the_score(folder: Path, make: Make) -> None:
    found = {}
    for name, options in {
        "mean": {},
        "worst": {"ensemble_aggregation": "worst_case"},
        "uncertain": {"ensemble_aggregation": "uncertainty", "uncertainty_coef": 2.0},
    }.items():
        model = shared_base(folder)
        add_reward_role(model, "reward_1", seed=5)
        trainer = make(model, **options)
        torch.manual_seed(0)
        rollout = trainer.advantages(trainer.rollout(rows_of(PROMPTS[:4])))
        both = torch.stack([trainer.sampler.reward_scores(rollout, role) for role in ("reward", "reward_1")])
        found[name] = rollout.scores, both
    both = found["mean"][1]
    torch.testing.assert_close(found["mean"][0], both.mean(0))
    torch.testing.assert_close(found["worst"][0], both.amin(0))
    torch.testing.assert_close(found["uncertain"][0], both.mean(0) - 2.0 * (both[0] - both[1]) ** 2 / 4)


# --- PPO-ptx and the moving average -----------------------------------------------------------------------------------


def test_the_same_seed_trains_the_same_bits_and_another_seed_does_not(folder: Path, make: Make) -> None:
    first, again, other = (after_one_update(folder, make, {"seed": seed}) for seed in (7, 7, 8))
    assert all(torch.equal(first[role], again[role]) and not torch.equal(first[role], other[role]) for role in first)


@pytest.mark.parametrize("episodes, updates", [(4, 1), (12, 3), (13, 4), (40, 10)])
def test_total_episodes_count_prompts_and_may_repeat_them(make: Make, episodes: int, updates: int) -> None:
    trainer = make(total_episodes=episodes, response_length=1, num_ppo_epochs=1)
    trainer.train()
    logged = [row["episode"] for row in trainer.state.log_history if "episode" in row]
    assert trainer.state.global_step == updates and logged == [4 * (i + 1) for i in range(updates)]


def test_without_total_episodes_epochs_count(make: Make) -> None:
    trainer = make(total_episodes=None, num_train_epochs=2, response_length=1, num_ppo_epochs=1)
    trainer.train()
    assert trainer.state.global_step == 6


def test_longer_prompts_than_max_prompt_length_are_bad_rows(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": " ".join(["w5", *["w6"] * n])}) + "\n" for n in range(10)))
    recipe = Recipe("lengths", Base(str(folder)), ppo=PPOStage(str(data), heldout=0.2))
    used = []
    for limit in (None, 4):
        config = ppo_config(tmp_path, max_prompt_length=limit)
        prepared = prepare_stage(recipe, "ppo", config, load_tokenizer(recipe.base))
        rows = [*prepared.train, *prepared.heldout]
        assert all(len(row["prompt_ids"]) <= (limit or 10) for row in rows)
        used.append(len(rows))
    assert used == [10, 4]


@pytest.mark.parametrize(
    "option, value",
    [
        ("response_length", 0),
        ("temperature", 0.0),
        ("num_ppo_epochs", 0),
        ("num_mini_batches", 0),
        ("rollout_micro_batch_size", 0),
        ("total_episodes", 0),
        ("max_prompt_length", 0),
        ("cliprange", 0.0),
        ("cliprange_value", -0.2),
        ("kl_coef", -0.1),
        ("vf_coef", -1.0),
        ("critic_learning_rate", -1e-5),
        ("missing_eos_penalty", -1.0),
        ("gamma", 1.1),
        ("lam", -0.1),
        ("temperature", float("nan")),
        ("kl_estimator", "k2"),
        ("advantage_estimator", "a2c"),
        ("reward_normalization", "batch"),
        ("ensemble_aggregation", "median"),
        ("critic", "policy"),
        ("num_generations", 0),
        ("reward_clip", 0.0),
        ("target_kl", 0.0),
        ("max_kl", -1.0),
        ("length_penalty", -0.1),
        ("uncertainty_coef", -0.1),
        ("critic_warmup_steps", -1),
        ("ptx_coef", -1.0),
        ("ptx_batch_size", 0),
        ("ptx_max_length", 1),
        ("ema_decay", 1.0),
    ],
)
def test_a_bad_option_is_refused_by_name(tmp_path: Path, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"ppo\.{option} must"):
        ppo_config(tmp_path, **{option: value})


def test_fewer_prompts_than_one_rollout_are_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"ppo\.data has 12 prompts .* fewer than one rollout's 16"):
        make(per_device_train_batch_size=4, num_mini_batches=2, gradient_accumulation_steps=2)


@pytest.mark.long
@pytest.mark.parametrize(("processes", "gpus"), [(2, 1), (1, 2)])
def test_processes_of_accelerate_and_a_second_gpu_are_refused(processes: int, gpus: int) -> None:
    config: Any = SimpleNamespace(world_size=processes, n_gpu=gpus)
    with pytest.raises(ValueError, match="a process for each GPU, and none of accelerate's: there are 2"):
        check_fit(config, prompts=8, has_texts=False)


@pytest.mark.long
def test_two_processes_are_refused(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(
        "from datasets import Dataset\n"
        "from rlhf_recipes import PPOConfig, PPOTrainer\n"
        f"PPOTrainer(None, PPOConfig({str(tmp_path)!r}, use_cpu=True), Dataset.from_list([]), None)\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "ValueError: PPOTrainer wants a process for each GPU, and none of accelerate's: there are 2." in done.stderr
