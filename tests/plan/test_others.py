"""The plan of what is in memory beside the base and its roles: reward models of others, labelers, vLLM, loading."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support.memory_meter import measured
from support.memory_meter import weight_bytes as bytes_of_weights
from support.run_folder import write_rows
from support.tiny_models import save_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_recipes import Base, PPOStage, Recipe, Stage
from rlhf_recipes.model.base import load_base
from rlhf_recipes.pipeline.check import check_recipe
from rlhf_recipes.plan import fit
from rlhf_recipes.plan.plan import plan_memory
from rlhf_recipes.plan.stage_memory import StagePlan
from rlhf_recipes.recipe.values import DPOStage, Rounds
from rlhf_recipes.stages.scores import ExternalRewardModel

MIB = 2**20


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("others")
    rows = [{"prompt": f"w{i}", "chosen": "w4", "rejected": "w5"} for i in range(4, 24)]
    data = str(folder / "rows.jsonl")
    write_rows(folder / "rows.jsonl", rows)
    args: dict[str, Any] = {"per_device_train_batch_size": 2, "max_steps": 1}
    return Recipe(
        "others",
        Base(str(save_model(folder / "model")), dtype="float32"),
        reward=Stage(data, args={**args, "max_length": 32}),
        ppo=PPOStage(data, args={**args, "max_prompt_length": 16, "response_length": 16, "num_mini_batches": 2}),
        dpo=DPOStage(data, args={**args, "max_length": 32, "response_length": 16}),
        tracker="none",
    )


def planned(recipe: Recipe, stage: str = "ppo", **changes: Any) -> StagePlan:
    recipe = dataclasses.replace(recipe, **changes)
    return plan_memory(recipe, check_recipe(recipe), only=[stage]).stages[stage]


def save_classifier(folder: Path, dtype: torch.dtype) -> Path:
    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_labels=1, pad_token_id=0,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config, dtype=dtype).save_pretrained(folder)
    save_model(folder / "tokenizer")
    for file in (folder / "tokenizer").glob("tokenizer*"):
        file.rename(folder / file.name)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reward_models_of_others_are_counted_as_they_are_loaded(
    recipe: Recipe, tmp_path: Path, dtype: torch.dtype
) -> None:
    name = str(save_classifier(tmp_path, dtype))
    loaded = ExternalRewardModel(name)
    assert loaded.model.dtype == dtype
    # Two bytes or four a weight: the embeddings, three layers of attention, MLP and norms, a norm and the head.
    weights = 64 * 128 + 3 * (4 * 128**2 + 3 * 128 * 512 + 2 * 128) + 128 + 128
    buffers = 2 * 16 * 4  # of the rotary embedding
    assert bytes_of_weights(loaded.model) == weights * dtype.itemsize + buffers
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()  # what a plan reads is the configuration alone
    assert recipe.ppo is not None
    ppo = dataclasses.replace(recipe.ppo, reward_funcs=("reward", name))
    size = (weights * dtype.itemsize + buffers) / MIB
    before, after = planned(recipe), planned(recipe, ppo=ppo)
    assert before.parts["other_models"] == 0 and after.parts["other_models"] == pytest.approx(size)
    for phase in ("generate", "update"):
        assert after.phases[phase] - before.phases[phase] == pytest.approx(size), phase
    assert after.phases["score"] - before.phases["score"] >= size - 1e-6
    assert planned(recipe, "dpo", ppo=ppo).phases["compare"] > planned(recipe, "dpo").phases["compare"] + 0.99 * size


def test_a_labeler_on_this_machine_is_a_phase_of_its_own(recipe: Recipe, tmp_path: Path) -> None:
    judge = save_model(tmp_path, hidden_size=256, intermediate_size=1024)
    size = bytes_of_weights(load_base(Base(str(judge)))) / MIB
    phases = planned(recipe, rounds=Rounds(labeler=str(judge))).phases
    assert 1.01 * size < phases["label"] < 3 * size, "its weights, and eight questions at once"
    assert {name: mib for name, mib in phases.items() if name != "label"} == planned(recipe).phases
    for labeler in ("people", "statistics:mean"):  # who takes no memory here
        assert "label" not in planned(recipe, rounds=Rounds(labeler=labeler)).phases


def test_vllm_takes_its_share_while_it_samples_or_always(recipe: Recipe) -> None:
    configs, gpu = check_recipe(recipe), 2**30
    native = plan_memory(recipe, configs, gpu, only=["ppo"]).stages["ppo"]
    configs["ppo"].generation_backend, configs["ppo"].vllm_gpu_memory_utilization = "vllm", 0.25
    sleeping = plan_memory(recipe, configs, gpu, only=["ppo"]).stages["ppo"]
    configs["ppo"].vllm_enable_sleep_mode = False
    awake = plan_memory(recipe, configs, gpu, only=["ppo"]).stages["ppo"]
    assert native.parts["kv_cache"] > 0 == sleeping.parts["kv_cache"], "its KV cache is in its share"
    assert sleeping.parts["other_models"] == 256
    assert 256 < sleeping.phases["generate"] < 256 + native.phases["generate"]
    for phase in ("score", "update"):
        assert sleeping.phases[phase] == native.phases[phase] == awake.phases[phase] - 256


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    # What is converted without being quantized is converted in threads, which are not metered.
    [(None, torch.float32), *((name, dtype) for name in ("nf4", "int8") for dtype in (torch.float32, torch.bfloat16))],
)
def test_loading_takes_what_was_planned(recipe: Recipe, tmp_path: Path, quantization: Any, dtype: torch.dtype) -> None:
    model = save_model(tmp_path, hidden_size=256, intermediate_size=1024, vocab_size=256)
    AutoModelForCausalLM.from_pretrained(model, dtype=dtype).save_pretrained(model)
    base = Base(str(model), quantization=quantization)
    phases = planned(recipe, "reward", base=base).phases
    with measured() as meter:
        load_base(base)
    assert phases["load"] == pytest.approx(meter.peak / MIB, rel=0.1)


def test_a_cpus_plan_says_what_the_process_may_hold(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = check_recipe(recipe)
    plan = plan_memory(recipe, configs)
    assert "may hold up to" in plan.line("ppo") and "may hold" not in plan_memory(recipe, configs, 2**30).line("ppo")
    needed = max(plan.stages[stage].needed_mib for stage in plan.stages)
    saved: list[bool] = []
    monkeypatch.setattr(fit, "give_back_at_once", lambda: saved.append(True))
    for limit, times in ((1.05 * needed, 1), (10 * needed, 0)):
        monkeypatch.setattr("rlhf_recipes.plan.plan.available_bytes", lambda base, limit=limit: limit * MIB)
        saved.clear()
        fit.check_memory(recipe, configs, force=False, console=Console(quiet=True))
        assert len(saved) == times, "half as much is held, more slowly, where it would not fit"
