"""GPUs by name, and what a stage takes and how long on one, against what was measured on an H200."""

from pathlib import Path
from typing import Any

import pytest
from support.published_shapes import (
    GEMMA3_4B,
    GEMMA3_12B,
    LLAMA_8B,
    MISTRAL_7B,
    QWEN3_4B,
    QWEN3_8B,
    QWEN_14B,
    QWEN_32B,
    SMOLLM3_3B,
)
from transformers import AutoConfig

from rlhf_recipes import Base, PPOConfig, load, replace
from rlhf_recipes.plan.advice import settings_that_fit
from rlhf_recipes.plan.cards import card_called, card_of, on_card
from rlhf_recipes.plan.hours import hours, seconds_of_stages, seconds_of_step
from rlhf_recipes.plan.plan import MemoryPlan, plan_memory
from rlhf_recipes.recipe.lookup import recipe_file
from rlhf_recipes.recipe.values import PPOStage, Recipe, Stage
from rlhf_recipes.stages.configure import configure

GIB = 2**30


def on_gpu(folder: Path, model: dict[str, Any], **changes: Any) -> tuple[Recipe, PPOConfig]:
    """Half an update of 64 episodes of 512 + 512 tokens, as tests/benchmarks/shapes.py makes it."""
    AutoConfig.for_model(**model).save_pretrained(folder)
    args: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "num_mini_batches": 2,
        "num_ppo_epochs": 1,
        "rollout_micro_batch_size": 32,
        "max_prompt_length": 512,
        "response_length": 512,
        "optim": "paged_adamw_8bit",
        "generation_backend": "eager",  # the one that was measured
    }
    ppo = PPOStage("none", args=args | changes)
    recipe = Recipe("gpu", Base(str(folder), quantization="nf4"), reward=Stage("none"), ppo=ppo)
    return recipe, PPOConfig(str(folder), use_cpu=True, bf16=False, **args | changes)


@pytest.mark.parametrize(
    ("model", "allocated", "held"),
    [  # GiB, in generate, score, update, and of the allocator and CUDA's context at most
        (MISTRAL_7B, (9.82, 5.76, 6.82), 11.14 + 0.73),
        pytest.param(QWEN_14B, (17.78, 11.70, 13.85), 20.50 + 0.73, marks=pytest.mark.long),
    ],
)
def test_memory_is_what_an_h200_took(
    tmp_path: Path, model: dict[str, Any], allocated: tuple[float, ...], held: float
) -> None:
    recipe, config = on_gpu(tmp_path, model)
    planned = plan_memory(recipe, {"ppo": config}, 24 * GIB).stages["ppo"]
    for phase, measured in zip(("generate", "score", "update"), allocated, strict=True):
        assert planned.phases[phase] / 1024 == pytest.approx(measured, rel=0.01), phase
    assert planned.needed_mib / 1024 == pytest.approx(held, rel=0.03)


def test_a_captured_step_takes_its_graphs_and_one_more_copy_of_the_adapter(tmp_path: Path) -> None:
    recipe, config = on_gpu(tmp_path, MISTRAL_7B)
    eager = plan_memory(recipe, {"ppo": config}, 24 * GIB).stages["ppo"]
    config.generation_backend = "native"
    captured = plan_memory(recipe, {"ppo": config}, 24 * GIB).stages["ppo"]
    adapter = 2 * 16 * 32 * (2 * 8192 + 2 * 5120 + 3 * 18432)  # q and o, k and v, the MLP's, in 16 bits
    buffers, weight = 32 * (16 * 513 + 21), 2 * 4096 * 14336
    more = (captured.phases["generate"] - eager.phases["generate"]) * 2**20
    assert more == pytest.approx(adapter + buffers + weight)
    assert captured.parts["kv_cache"] == eager.parts["kv_cache"] == 4096
    config.response_length = 500
    assert plan_memory(recipe, {"ppo": config}, 24 * GIB).stages["ppo"].parts["kv_cache"] == 4096, "whole blocks"


def test_seconds_hold_those_of_an_h200(tmp_path: Path) -> None:
    recipe, config = on_gpu(tmp_path, MISTRAL_7B)
    card = card_of("h200")
    planned = plan_memory(recipe, {"ppo": config}, card.gib * GIB).stages["ppo"]
    ranges = seconds_of_step(recipe, "ppo", config, planned, card)
    for phase, measured in {"generate": 37.4, "score": 4.4, "update": 9.5}.items():
        least, most = ranges[phase]
        assert least < measured < most
        if phase != "generate":
            assert (least * most) ** 0.5 == pytest.approx(measured, rel=0.05)
    assert ranges["generate"][1] == pytest.approx(37.4, rel=0.05)
    config.generation_backend = "native"  # which nobody has measured
    ranges = seconds_of_step(recipe, "ppo", config, planned, card)
    least, most = ranges["generate"]
    assert most == pytest.approx(37.4, rel=0.05), "of the eager loop"
    # A token of 32 rows moves the weights in 4 bits, writes and reads them in 16, and the cache in the middle.
    bytes_moved = 3.85 * GIB + 4 * 6.98e9 + 4 * GIB * 0.75
    assert least == pytest.approx(512 * bytes_moved / (0.83 * 4.8e12) + 0.6, rel=0.1)
    both = [100 * sum(seconds[i] for seconds in ranges.values()) / 3600 for i in range(2)]
    assert hours(ranges, 100) == pytest.approx(both)
    config.total_episodes = 100 * config.rollout_size
    plan = MemoryPlan({"ppo": planned}, 1e6, True)
    whole = seconds_of_stages(recipe, {"ppo": config}, plan, {"ppo": 10**6}, card)["ppo"]
    assert whole == pytest.approx([3600 * number for number in both])
    assert seconds_of_stages(recipe, {"ppo": config}, plan, {"ppo": 10**6}, None) == {}
    slow = seconds_of_step(recipe, "ppo", config, planned, card_of("t4"))
    assert all(slow[phase][0] > ranges[phase][0] for phase in ranges)


@pytest.mark.long
def test_32b_on_24_gib_is_told_what_it_fits_with(tmp_path: Path) -> None:
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16, "rollout_micro_batch_size": 8}
    recipe, config = on_gpu(tmp_path, QWEN_32B, **sizes)
    gpu = card_of("rtx4090").gib * GIB
    assert not plan_memory(recipe, {"ppo": config}, gpu).fits
    settings = settings_that_fit(recipe, "ppo", {"ppo": config}, gpu)
    assert settings is not None and "lora.r=8" in settings


def test_cards_by_name_and_by_size() -> None:
    assert [card_of(name).name for name in ("rtx4090", "RTX 4090", "4090", "NVIDIA L4", "A100-40")] == [
        *3 * ["rtx4090"],
        "l4",
        "a100-40",
    ]
    sizes = {"24GiB": 24, "24gb": 24e9 / GIB, "512MiB": 0.5, "1.5": 1.5}
    assert {text: card_of(text).gib for text in sizes} == pytest.approx(sizes)
    for wrong, nearest in {"a100": "a100-40, a100-80", "t5": "t4", "rtx4070": "rtx4090", "a lot": "."}.items():
        with pytest.raises(ValueError, match=f"--gpu={wrong} is no GPU that is known .*The nearest: .*{nearest}"):
            card_of(wrong)


@pytest.mark.parametrize(
    ("called", "gib", "name"),
    [
        ("Tesla T4", 14.6, "t4"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"),
        ("NVIDIA A100 80GB PCIe", 79.2, "a100-80"),
        ("NVIDIA H100 PCIe", 79.1, "h100-pcie"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA GeForce RTX 4060 Ti", 15.7, "rtx4060ti-16"),
        ("NVIDIA GeForce RTX 4060 Ti", 7.7, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.7, None),
        ("NVIDIA L40S", 44.5, "l40s"),
        ("NVIDIA A10G", 22.1, None),
    ],
)
def test_the_machine_s_own_card_is_looked_up(called: str, gib: float, name: str | None) -> None:
    card = card_called(called, gib)
    assert (card and card.name) == name


def test_a_card_without_bfloat16_is_planned_with_float16(tmp_path: Path) -> None:
    recipe, config = on_gpu(tmp_path, MISTRAL_7B | {"num_hidden_layers": 2})
    on_t4 = on_card(recipe, card_of("t4"))
    assert on_t4.base.dtype == "float16" and on_card(recipe, card_of("l4")) == recipe
    plans = [plan_memory(planned, {"ppo": config}, 14 * GIB) for planned in (recipe, on_t4)]
    assert plans[0] == plans[1], "a number takes as much in either"


LARGE, SMALL = "24GiB", "16GiB"


@pytest.mark.parametrize(
    ("name", "model", "card", "changes"),
    [
        ("mistral-7b-hh-dpo", MISTRAL_7B, LARGE, {}),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                ("qwen3-8b-ultrafeedback", QWEN3_8B, SMALL, {}),
                ("mistral-7b-hh", MISTRAL_7B, LARGE, {}),
                ("llama-3-1-8b-helpsteer3", LLAMA_8B, SMALL, {}),
                ("smollm3-3b-hh", SMOLLM3_3B, SMALL, {}),
                ("qwen3-4b-ultrafeedback", QWEN3_4B, LARGE, {}),
                ("qwen3-4b-ultrafeedback", QWEN3_4B, SMALL, {"quantization": "nf4"}),
                ("qwen3-4b-tldr", QWEN3_4B, LARGE, {}),
                ("qwen3-4b-tldr", QWEN3_4B, SMALL, {"quantization": "nf4"}),
                ("gemma-3-4b-hh", GEMMA3_4B, LARGE, {}),
                ("gemma-3-4b-hh", GEMMA3_4B, SMALL, {"quantization": "nf4"}),
                ("gemma-3-12b-hh", GEMMA3_12B, LARGE, {}),
            )
        ),
    ],
)
def test_recipes_fit_the_cards_that_they_name(
    tmp_path: Path, name: str, model: dict[str, Any], card: str, changes: dict[str, Any]
) -> None:
    AutoConfig.for_model(**model).save_pretrained(tmp_path)
    recipe = on_card(replace(load(name), base={"model": str(tmp_path), **changes}), card_of(card))
    planned = plan_memory(recipe, configure(recipe), card_of(card).gib * GIB)
    assert planned.stages.keys() == ({"sft", "dpo"} if recipe.dpo else {"sft", "reward", "ppo"}) and planned.fits
    assert card[:-3] in recipe_file(name).read_text().split('"""')[1], "its docstring names the card"
