"""The stages' configurations: every argument of TRL's and transformers' trainers is read, owned or refused."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import trl
from support.command_line import error_of
from transformers import TrainingArguments

from rlhf_recipes import load
from rlhf_recipes.pipeline.check import check_recipe
from rlhf_recipes.recipe import overrides
from rlhf_recipes.recipe.arguments import OWNED, REFUSED, REFUSED_IN, objection
from rlhf_recipes.stages.configure import CONFIGS, training_steps
from rlhf_recipes.stages.options import DPOConfig, RewardConfig, SFTConfig

# What transformers' Trainer reads, in every stage unless REFUSED_IN says otherwise.
TRAINER = {
    *("per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size", "num_train_epochs"),
    *("max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor"),
    *("neftune_noise_alpha", "tf32", "torch_empty_cache_steps", "full_determinism", "accelerator_config", "debug"),
    *("activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing"),
    *("gradient_checkpointing_kwargs", "torch_compile", "torch_compile_backend", "torch_compile_mode"),
    *("use_liger_kernel", "liger_kernel_config", "skip_memory_metrics", "include_num_input_tokens_seen"),
    *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_level"),
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size"),
    *("save_strategy", "save_steps", "save_total_limit", "save_only_model", "load_best_model_at_end"),
    *("metric_for_best_model", "greater_is_better", "ignore_data_skip", "restore_callback_states_from_checkpoint"),
    *("dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order"),
    "train_sampling_strategy",
}
# What TRL's trainer of the stage reads on rows that are tokenized already.
TRL = {
    "sft": {"router_aux_loss_coef", "pad_to_multiple_of", "loss_type", "activation_offloading"},
    "reward": {"disable_dropout", "pad_to_multiple_of", "center_rewards_coefficient", "activation_offloading"},
    "dpo": {
        *("router_aux_loss_coef", "disable_dropout", "pad_to_multiple_of", "precompute_ref_log_probs"),
        *("precompute_ref_batch_size", "loss_type", "loss_weights", "ld_alpha", "f_divergence_type"),
        *("f_alpha_divergence_coef", "label_smoothing", "beta", "use_weighting", "discopop_tau"),
        "activation_offloading",
    },
    "ppo": set(),
}


@pytest.mark.parametrize("stage", CONFIGS)
def test_every_argument_is_read_owned_or_refused(stage: str) -> None:
    names = {f.name for f in fields(CONFIGS[stage]) if f.init}
    ours = set(CONFIGS[stage].__annotations__) - {"eval_packing"}
    refused = {name for name in names if objection(stage, name)}
    read = (TRAINER - REFUSED_IN[stage].keys()) | TRL[stage] | ours
    advice = "refuse it in recipe/arguments.py, or name it here where a trainer reads it"
    assert not names - read - refused, f"new in TRL or transformers: {advice}"
    assert not read & refused, f"both read and refused: {advice}"


def test_no_argument_is_in_two_tables() -> None:
    for table in REFUSED_IN.values():
        assert not table.keys() & (REFUSED.keys() | OWNED.keys())
    assert not REFUSED.keys() & OWNED.keys() and not TRAINER & (REFUSED.keys() | OWNED.keys())
    inherited = {f.name for f in fields(TrainingArguments)}
    assert inherited - {*TRAINER, *OWNED, *REFUSED} == set()


def recipe_of(stage: str) -> Any:
    return load("tiny-dpo" if stage == "dpo" else "tiny")


@pytest.mark.parametrize("stage", CONFIGS)
def test_a_refused_argument_is_named_with_its_reason_before_anything_is_loaded(stage: str) -> None:
    recipe = recipe_of(stage)
    section = getattr(recipe, stage)
    for key, reason in (OWNED | REFUSED | REFUSED_IN[stage]).items():
        changed = replace(recipe, **{stage: replace(section, args={**section.args, key: None})})
        with pytest.raises(ValueError) as error:
            check_recipe(changed)
        message = str(error.value)
        assert message.startswith(f"{stage}.{key} ") and reason.format(stage=stage) in message
        assert "{" not in message and "\n" not in message


def test_the_command_line_says_it_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(capsys, ["run", "tiny", "sft.dataset_text_field=foo"])
    assert "sft.dataset_text_field cannot be set: rows are tokenized before TRL sees them" in error


@pytest.mark.parametrize(
    ("stage", "args", "message"),
    [
        ("dpo", {"train_sampling_strategy": "group_by_length"}, "dpo.train_sampling_strategy=group_by_length"),
        ("ppo", {"train_sampling_strategy": "batch_rebalance"}, "set random or sequential"),
        ("sft", {"packing": True, "max_length": None}, "sft.packing fills rows of sft.max_length tokens"),
        ("ppo", {"total_episodes": 64, "max_steps": 1}, "ppo.total_episodes and ppo.max_steps both say"),
    ],
)
def test_a_value_that_would_fail_or_be_ignored_is_refused(stage: str, args: dict[str, Any], message: str) -> None:
    recipe = recipe_of(stage)
    section = getattr(recipe, stage)
    with pytest.raises(ValueError, match=message):
        check_recipe(replace(recipe, **{stage: replace(section, args={**section.args, **args})}))


def test_steps_are_counted_as_the_trainer_counts_them(tmp_path: Path) -> None:
    where: dict[str, Any] = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "num_train_epochs": 1}
    sft = CONFIGS["sft"](**where, per_device_train_batch_size=4, gradient_accumulation_steps=8)
    assert [training_steps("sft", sft, rows) for rows in (1, 32, 33, 100)] == [1, 1, 2, 4]
    sft.packing = True
    assert training_steps("sft", sft, 100) is None
    ppo = CONFIGS["ppo"](**where, mini_batch_size=64, num_mini_batches=8, num_generations=2)  # 256 prompts a rollout
    assert [training_steps("ppo", ppo, rows) for rows in (256, 511, 51_200 * 0.95)] == [1, 1, 190]
    ppo.total_episodes = 1025
    assert training_steps("ppo", ppo, 51_200) == 3
    ppo.total_episodes, ppo.max_steps = None, 7
    assert training_steps("ppo", ppo, 51_200) == 7


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sft": {"data": "https://me:secret@example.com/a.jsonl"}}, r"sft\.data: https://example\.com/a\.jsonl"),
        ({"sft": {"args": {"hub_token": "secret"}}}, r"sft\.hub_token cannot be set"),
        ({"rounds": {"labeler": "https://secret@example.com/v1"}}, r"rounds\.labeler: https://example\.com/v1"),
    ],
)
def test_a_secret_is_refused_before_a_recipe_is_written(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        check_recipe(overrides.replace(load("tiny-rounds"), **changes))
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("ours", "theirs", "changed"),
    [
        (SFTConfig, trl.SFTConfig, {"truncation_mode", "eval_packing"}),
        (RewardConfig, trl.RewardConfig, set()),
        (DPOConfig, trl.DPOConfig, {"truncation_mode", "learning_rate"}),
    ],
)
def test_all_other_defaults_are_trls(ours: type, theirs: type, changed: set[str]) -> None:
    own = {field.name: field.default for field in fields(ours)}  # type: ignore[arg-type]
    assert {field.name for field in fields(theirs) if own[field.name] != field.default} == changed  # type: ignore
