"""The plan: planned and measured memory, what does not fit, what to change, what is said when memory runs out."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from support.memory_meter import measured
from support.memory_meter import weight_bytes as bytes_of_weights
from support.run_folder import manifest_of, states, write_rows
from support.tiny_models import ARCHITECTURES, make_tokenizer, save_model
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_recipes import Base, PPOStage, Recipe, Stage, replace, run
from rlhf_recipes.cli.main import main_cli
from rlhf_recipes.model.base import load_base
from rlhf_recipes.pipeline.check import check_recipe
from rlhf_recipes.plan.advice import helpful_changes, over_several, settings_that_fit
from rlhf_recipes.plan.dry_run import dry_run, optimizer_bytes, phases_of
from rlhf_recipes.plan.meter import MicroBatchMemory
from rlhf_recipes.plan.plan import (
    at_full_depth,
    largest_size,
    least_checkpointed,
    plan_memory,
    settle_auto_sizes,
    shape_of,
    stage_plan,
)
from rlhf_recipes.plan.skeleton import weight_bytes
from rlhf_recipes.plan.stage_memory import CONTEXT, FRAGMENTS, WORKSPACES, held_beside
from rlhf_recipes.plan.work import work_of_step
from rlhf_recipes.recipe.overrides import parse_overrides, to_dict
from rlhf_recipes.recipe.values import DPOStage
from rlhf_recipes.records.manifest import Manifest, _without_memory
from rlhf_recipes.stages.job import Job
from rlhf_recipes.stages.ppo.roles import ppo_roles

LENGTH = 40  # tokens of the longest prompt, and of the longest response
STAGES = ("sft", "reward", "ppo", "dpo")


def words(rng: random.Random, least: int) -> str:
    return " ".join(f"w{rng.randrange(4, 64)}" for _ in range(rng.choice((least, LENGTH))))


def make_recipe(folder: Path, model: Path, base: dict[str, Any], checkpointing: bool = False, **ppo: Any) -> Recipe:
    """All four stages, each with a few steps on rows of which most are as long as they may be."""
    rng = random.Random(0)
    for name, keys in {"sft": ("prompt", "completion"), "dpo": ("prompt", "chosen", "rejected")}.items():
        write_rows(folder / f"{name}.jsonl", [{key: words(rng, LENGTH - 3) for key in keys} for _ in range(20)])
    shared = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    shared |= {"gradient_checkpointing": checkpointing, "learning_rate": 1e-3}
    args = {**shared, "per_device_eval_batch_size": 2, "max_steps": 2, "max_length": 2 * LENGTH + 1}
    own = {"num_ppo_epochs": 2, "max_steps": 1, "max_prompt_length": LENGTH, "response_length": LENGTH}
    texts = {name: str(folder / f"{name}.jsonl") for name in ("sft", "dpo")}
    return Recipe(
        name="planned",
        base=Base(str(model), **base),
        sft=Stage(texts["sft"], heldout=0.1, args=args),
        reward=Stage(texts["dpo"], heldout=0.1, args=args),
        ppo=PPOStage(texts["sft"], heldout=0.1, args={**shared, **own, "rollout_micro_batch_size": 8, **ppo}),
        dpo=DPOStage(texts["dpo"], heldout=0.1, args={**args, "response_length": LENGTH}),
        tracker="none",
    )


def save_larger_model(folder: Path, architecture: str, layers: int, dtype: str) -> Path:
    """A model that is large enough for its weights, activations and logits to be what takes the memory.

    It is saved as it will be held: what loading it in another precision takes for a moment is not planned.
    """
    shape = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": layers, "vocab_size": 8192}
    config = AutoConfig.for_model(architecture, **ARCHITECTURES[architecture] | shape, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("planned")
    return make_recipe(folder, save_model(folder / "model"), {})


# --- Planned and measured ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "layers", "dtype", "checkpointing", "stages"),
    [
        ("llama", 4, "float32", False, STAGES),
        pytest.param("llama", 6, "bfloat16", True, STAGES[:3], marks=pytest.mark.long),
        pytest.param("gpt_neox", 4, "bfloat16", False, STAGES[:3], marks=pytest.mark.long),
    ],
)
def test_every_stage_takes_what_was_planned(
    tmp_path: Path, architecture: str, layers: int, dtype: str, checkpointing: bool, stages: tuple[str, ...]
) -> None:
    model = save_larger_model(tmp_path / "model", architecture, layers, dtype)
    recipe = make_recipe(tmp_path, model, {"dtype": dtype}, checkpointing)
    planned = plan_memory(recipe).stages
    with measured() as loading:
        base = load_base(recipe.base)
    mapped = bytes_of_weights(base) - loading.left  # read in place from the file: no allocation
    for stage in stages:
        with measured() as meter:
            run(recipe, tmp_path / "run", [stage])
        peak = (meter.peak + mapped) / 2**20
        assert planned[stage].peak_mib == pytest.approx(peak, rel=0.1), stage


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_weights_take_what_was_counted(tmp_path: Path, architecture: str, quantization: Any) -> None:
    base = Base(str(save_model(tmp_path, architecture)), quantization=quantization)
    model = load_base(base)
    held = bytes_of_weights(model)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            held += state.absmax.nbytes + state.state2.absmax.nbytes
        if isinstance(module, Linear8bitLt):  # the first forward moves the constants
            held += (module.state.SCB if module.weight.SCB is None else module.weight.SCB).nbytes
    # Blocks of constants that are not full take as much as full ones.
    assert weight_bytes(base) == pytest.approx(held, rel=0.02)


def test_quantized_weights_by_hand(tmp_path: Path) -> None:
    base = Base(str(save_model(tmp_path)), quantization="nf4")
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)  # two layers: q and o, k and v, the three of the MLP
    others = 2 * 64 * 64 + 5 * 64  # embeddings and head, norms
    rotary = 2 * 8 * 4  # buffers
    assert weight_bytes(base) == linear * (0.5 + 1 / 64 + 4 / 64 / 256) + 2 * others + rotary


def test_adapters_and_their_optimizer_by_hand(recipe: Recipe) -> None:
    r, inputs_and_outputs = 16, 2 * (2 * 128 + 2 * 96 + 3 * 192)  # as above
    adapter = 4 * r * inputs_and_outputs
    parts = plan_memory(recipe, only=["ppo"]).stages["ppo"].parts
    heads = 2 * 64 * 4
    assert parts["adapters"] * 2**20 == 4 * adapter + heads  # reference, policy, reward, critic
    assert parts["gradients"] * 2**20 == 2 * adapter + heads / 2
    assert parts["optimizer"] == 2 * parts["gradients"]
    keys, values = 2 * 16 * 2 * 2 * LENGTH * 8 * 4, 2 * 16 * 2 * 2 * LENGTH * 8 * 4  # heads, dim, layers, tokens, rows
    assert parts["kv_cache"] * 2**20 == keys + values
    other = replace(recipe, ppo={"critic": "head", "ema_decay": 0.9}, reward={"ensemble_size": 3})
    parts = plan_memory(other, only=["ppo"]).stages["ppo"].parts
    assert parts["adapters"] * 2**20 == 6 * adapter + 2 * heads  # reference, policy, its average, three rewards
    assert parts["gradients"] * 2**20 == adapter + heads / 2


@pytest.mark.parametrize(
    ("optim", "size"),
    [("adamw_torch_fused", 8), ("paged_adamw_8bit", 2 + 8 / 256), ("lion_8bit", 1 + 4 / 256), ("sgd", 0)],
)
def test_optimizer_state(optim: str, size: float) -> None:
    assert optimizer_bytes(optim, [torch.nn.Parameter(torch.zeros(64, 128))]) == size * 64 * 128


# Under autocast each layer's adapter is there in 16 bits too.
@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_depth_goes_on_in_a_straight_line(tmp_path: Path, dtype: str) -> None:
    shape = {"num_hidden_layers": 5, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96}
    config = AutoConfig.for_model("qwen3", **ARCHITECTURES["qwen3"] | shape)
    config.save_pretrained(tmp_path)  # no weights: none are read
    recipe = make_recipe(tmp_path, tmp_path, {"dtype": dtype}, checkpointing=True)
    for stage, section in check_recipe(recipe).items():
        if dtype == "bfloat16" and stage != "ppo":
            continue
        shape = shape_of(recipe, stage, section, on_gpu=False)
        for layers in (None, 2) if dtype == "bfloat16" else (None,):
            first = dataclasses.replace(shape, checkpointed=layers)
            whole: dict[str, float] = {}
            for phase in ("adapters", *phases_of(stage)):
                whole |= dry_run(first, 5, phase)
            carried, real = (with_peaks(numbers) for numbers in (at_full_depth(first), whole))
            assert carried == pytest.approx(real, rel=0.02), (stage, layers)


def with_peaks(numbers: dict[str, float]) -> dict[str, float]:
    """A dry run's numbers, with the peak of each phase in the place of its parts."""
    phases = {name.split(".")[0] for name in numbers if "." in name}
    peaks = {p: MicroBatchMemory(*(numbers[f"{p}.{name}"] for name in MicroBatchMemory._fields)).peak for p in phases}
    return {name: value for name, value in numbers.items() if "." not in name} | peaks


# --- What fits, and what to change ------------------------------------------------------------------------------------


def test_a_stage_that_cannot_fit_is_refused_before_anything_is_read(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peaks = {stage: planned.needed_mib for stage, planned in plan_memory(recipe).stages.items()}
    assert plan_memory(recipe).fits
    limit = 2**20 * (max(peaks.values()) - 0.01)
    monkeypatch.setattr("rlhf_recipes.plan.plan.available_bytes", lambda base: limit)
    with pytest.raises(
        ValueError, match=r"dpo does not fit: .* GiB, .* What helps most: .* same results.*It fits with dpo.*--force"
    ):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.json").exists()
    printed = capsys.readouterr().out
    assert "sft: 0.05 of 0.10 GiB planned" in printed
    assert run(recipe, tmp_path / "run", ["sft"], force=True)
    record = manifest_of(tmp_path / "run")["stages"]["sft"]
    assert record["planned_peak_mib"] > peaks["sft"] and record["peak_memory_mib"] > 0


def test_where_one_gpu_is_too_small_several_are_named(recipe: Recipe) -> None:
    plan = plan_memory(recipe, gpu=2**20, only=["sft"])
    assert "base.split=layers lays the base over all GPUs" in str(over_several(recipe, plan))
    split = replace(recipe, base={"split": "layers"})
    none = [
        (split, plan),
        (recipe, dataclasses.replace(plan, on_gpu=False)),
        (recipe, plan_memory(recipe, only=["sft"])),
    ]
    assert [over_several(*given) for given in none] == [None, None, None]


def test_a_run_plans_for_the_longest_rows_of_its_data(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = {stage: {"max_length": 1000} for stage in ("sft", "reward", "dpo")}
    peaks = {}

    def run_stage(job: Job, manifest: Manifest, planned: Any) -> None:
        peaks[job.stage] = planned.peak_mib
        if job.stage == "dpo":
            raise InterruptedError
        manifest.begin(job.stage, job.data.report)

    monkeypatch.setattr("rlhf_recipes.pipeline.stage.run_stage", run_stage)
    allowed = replace(recipe, **longer, ppo={"max_prompt_length": 1000})
    with pytest.raises(InterruptedError):
        run(allowed, tmp_path)
    # The recipe's own limits are as long as its rows.
    assert peaks == {stage: planned.peak_mib for stage, planned in plan_memory(recipe).stages.items()}
    assert all(peak < plan_memory(allowed).stages[stage].peak_mib for stage, peak in peaks.items())


@pytest.mark.long
def test_changes_are_what_a_new_plan_says(recipe: Recipe) -> None:
    before = plan_memory(recipe, only=["ppo"]).stages["ppo"].peak_mib
    changes = helpful_changes(recipe, "ppo", check_recipe(recipe))
    assert [change.peak_mib for change in changes] == sorted(change.peak_mib for change in changes)
    assert {change.settings: change.same_results for change in changes}.items() >= {
        ("ppo.gradient_checkpointing=true", True),
        ("lora.r=8", False),
    }
    for change in changes[:2]:
        changed = replace(recipe, **parse_overrides(change.settings.split()))
        assert plan_memory(changed, only=["ppo"]).stages["ppo"].peak_mib == change.peak_mib == before - change.saves_mib
        same = _without_memory(to_dict(recipe)) == _without_memory(to_dict(changed))
        assert same == change.same_results


@pytest.mark.parametrize(
    "key", ["per_device_train_batch_size", pytest.param("rollout_micro_batch_size", marks=pytest.mark.long)]
)
def test_auto_is_the_largest_that_fits(recipe: Recipe, key: str) -> None:
    args = {
        "mini_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "num_mini_batches": 2,
        "rollout_micro_batch_size": 4,
    }
    sizes = [4, 8, 16] if key == "per_device_train_batch_size" else [8, 16, 32]
    own = ["update"] if key == "per_device_train_batch_size" else ["generate", "score"]
    peaks = []
    for size in sizes:
        fixed = replace(recipe, base={"dtype": "float32"}, ppo={**args, key: size, "optim": "adamw_torch"})
        tried = plan_memory(fixed, gpu=2**40, only=["ppo"]).stages["ppo"]
        peak = max(tried.phases[phase] for phase in own)
        weights = tried.parts["weights"] * 2**20
        peaks.append(peak * 2**20 + sum(held_beside(peak * 2**20, weights, on_gpu=True).values()))
    auto = replace(recipe, ppo={**args, key: "auto"})
    for limit, size in zip(peaks, sizes, strict=True):
        config = check_recipe(replace(auto, base={"dtype": "float32"}, ppo={"optim": "adamw_torch"}))
        assert largest_size(auto, "ppo", config["ppo"], key, gpu=limit + 1) == size
    settle_auto_sizes(auto, "ppo", config["ppo"], gpu=peaks[1] + 1)
    assert getattr(config["ppo"], key) == sizes[1]


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_auto_accumulates_as_few_batches_as_fit(recipe: Recipe, stage: str) -> None:
    recipe = replace(recipe, base={"dtype": "float32"}, **{stage: {"optim": "adamw_torch"}})
    needs = {}
    for rows in (3, 6, 12):
        fixed = replace(recipe, **{stage: {"per_device_train_batch_size": rows}})
        planned = plan_memory(fixed, gpu=2**40, only=[stage]).stages[stage]
        peak, weights = planned.phases["train"] * 2**20, planned.parts["weights"] * 2**20
        needs[rows] = peak + sum(held_beside(peak, weights, on_gpu=True).values())
    auto = {"per_device_train_batch_size": 12, "gradient_accumulation_steps": "auto"}
    config = check_recipe(replace(recipe, **{stage: auto}))[stage]
    for rows, need in needs.items():
        settle_auto_sizes(recipe, stage, config, gpu=need + 1)
        chosen = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 12 // rows}
        assert config.chosen_sizes == chosen
    assert needs[3] < needs[6] < needs[12]


def test_auto_checkpoints_the_fewest_layers_that_memory_asks_for(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **ARCHITECTURES["llama"] | {"num_hidden_layers": 6})
    config.save_pretrained(tmp_path)
    own = {"gradient_checkpointing": "auto", "optim": "adamw_torch"}
    recipe = replace(make_recipe(tmp_path, tmp_path, {"dtype": "float32"}), ppo=own)
    needs = {}
    for layers in (0, 2, 6):
        fixed = replace(recipe, ppo={**own, "gradient_checkpointing": layers})
        planned = plan_memory(fixed, gpu=2**40, only=["ppo"]).stages["ppo"]
        peak, weights = planned.phases["update"] * 2**20, planned.parts["weights"] * 2**20
        needs[layers] = peak + sum(held_beside(peak, weights, on_gpu=True).values())
    assert needs[0] > needs[2] > needs[6]
    ppo = check_recipe(recipe)["ppo"]
    assert [least_checkpointed(recipe, ppo, gpu=need + 1) for need in needs.values()] == [0, 2, 6]
    assert least_checkpointed(recipe, ppo, gpu=needs[6] / 2) == 6, "for another to say that it does not fit"
    settle_auto_sizes(recipe, "ppo", ppo, gpu=needs[2] + 1)
    assert ppo.chosen_sizes == {"checkpointed_layers": 2}


def test_a_judge_is_one_more_adapter_and_trains_nothing(recipe: Recipe) -> None:
    with_judge = replace(recipe, reward={"judge_share": 0.2})
    config = check_recipe(with_judge)["ppo"]
    names = [[role.name for role in ppo_roles(planned, config)] for planned in (recipe, with_judge)]
    assert names == [["reference", "policy", "reward", "critic"], ["reference", "policy", "reward", "judge", "critic"]]
    assert work_of_step(with_judge, "ppo", config) == work_of_step(recipe, "ppo", config)
    plain, more = (stage_plan(planned, "ppo", config, gpu=None).parts for planned in (recipe, with_judge))
    assert more["adapters"] > plain["adapters"] and more["optimizer"] == plain["optimizer"]


def test_work_by_hand(recipe: Recipe) -> None:
    config = check_recipe(replace(recipe, ppo={"num_ppo_epochs": 3}))
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 64 * 64 + 5 * 64  # with head and norms
    tokens = 8 * 2 * LENGTH
    # One decoding and four forwards that score, then three times forward and backward of policy and critic.
    assert work_of_step(recipe, "ppo", config["ppo"]) == {
        "tokens": tokens,
        "flop": tokens * linear * (2 + 8 + 24),
        "steps": 1,
        "at_most": False,
    }
    tokens = 8 * (2 * LENGTH + 1)
    wanted = {"tokens": tokens, "flop": 4 * tokens * linear, "steps": 2, "at_most": False}
    assert work_of_step(recipe, "sft", config["sft"]) == wanted


def test_steps_of_a_limit_are_the_most_that_there_can_be(recipe: Recipe) -> None:
    prompts = {"limit": 100, "heldout": 0.25, "max_steps": -1, "num_train_epochs": 2}  # 75 prompts, 9 rollouts of 8
    work = work_of_step(recipe, "ppo", check_recipe(replace(recipe, ppo=prompts))["ppo"])
    assert work["steps"] is None, "the recipe that was given has no limit"
    limited = replace(recipe, ppo=prompts)
    work = work_of_step(limited, "ppo", check_recipe(limited)["ppo"])
    assert (work["steps"], work["at_most"]) == (18, True)
    episodes = replace(recipe, ppo={**prompts, "total_episodes": 81})
    work = work_of_step(episodes, "ppo", check_recipe(episodes)["ppo"])
    assert (work["steps"], work["at_most"]) == (11, False)


# --- The command line -------------------------------------------------------------------------------------------------


def test_plan_prints_a_table_or_json(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"from rlhf_recipes.recipe.values import *\nrecipe = {recipe!r}\n")
    words = ["plan", str(file), "--gpu", "t4", "ppo.response_length=20"]
    main_cli([*words, "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["limit_mib"] == 14.5 * 1024 and set(plan["stages"]) == set(STAGES)
    for name, stage in plan["stages"].items():
        assert stage["fits"] == (stage["needed_mib"] <= plan["limit_mib"]) and stage["fits_with"] is None
        assert set(stage["seconds"]) == ({"generate", "score", "update"} if name == "ppo" else {"train"})
        assert all(0 < least < most for least, most in [*stage["seconds"].values(), stage["hours"]])
        assert stage["peak_mib"] == max(stage["phases"].values())
        beside = stage["parts"]["fragments"] + stage["parts"]["context"]
        assert stage["needed_mib"] == pytest.approx(stage["peak_mib"] + beside)
    main_cli(words)
    printed = capsys.readouterr().out
    for words in ("of 14.5", "KV cache", "fragments", "CUDA context", "train, s", "hours"):
        assert words in printed
    with pytest.raises(SystemExit):
        main_cli(["plan", str(file), "--gpu", "a lot"])
    assert "--gpu=a lot is no GPU that is known and no size of memory" in capsys.readouterr().err


@pytest.mark.long
def test_what_does_not_fit_fits_with_the_settings_that_are_named(recipe: Recipe) -> None:
    configs = check_recipe(recipe)
    needed = plan_memory(recipe, configs, gpu=2**40, only=["ppo"]).stages["ppo"].needed_mib * 2**20
    fixed = CONTEXT + (1 + FRAGMENTS) * WORKSPACES  # which nothing makes smaller
    for share in (0.8, 0.6):
        gpu = fixed + share * (needed - fixed)
        words = settings_that_fit(recipe, "ppo", configs, gpu)
        assert words is not None
        changed = replace(recipe, **parse_overrides(words.split()))
        assert plan_memory(changed, check_recipe(changed), gpu, only=["ppo"]).fits
        assert _without_memory(to_dict(recipe)) == _without_memory(to_dict(changed)), "no result had to change"
    assert settings_that_fit(recipe, "ppo", configs, 2**29) is None


# --- Out of memory ----------------------------------------------------------------------------------------------------

GREEDY = """
import torch
from pathlib import Path
def greedy(completions, trainer_state=None, **columns):
    if trainer_state is not None and trainer_state.global_step == 1 and not Path({mark!r}).exists():
        torch.empty(2**50)
    return [float(len(text)) for text in completions]
"""


def test_out_of_memory_is_answered_and_resumes_with_settings_that_take_less(recipe: Recipe, tmp_path: Path) -> None:
    mark = tmp_path / "enough"
    (tmp_path / "greedy.py").write_text(GREEDY.format(mark=str(mark)))
    own = {
        "reward_funcs": (f"{tmp_path / 'greedy.py'}:greedy",),
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    recipe = replace(recipe, sft=None, reward=None, dpo=None, ppo=own)
    with pytest.raises(ValueError, match="ppo ran out of memory") as caught:
        run(recipe, tmp_path / "run")
    message = str(caught.value)
    assert "1125899906842624 bytes" in message or "4503599627370496 bytes" in message  # 2**50 numbers of 4 bytes
    assert "The plan was" in message and "What helps most: ppo." in message and "the same command resumes" in message
    assert isinstance(caught.value.__cause__, RuntimeError) and states(tmp_path / "run")["ppo"] == "running"
    mark.touch()
    less = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "rollout_micro_batch_size": 4}
    changed = replace(recipe, ppo={**less, "gradient_checkpointing": True})
    run(changed, tmp_path / "run")
    assert states(tmp_path / "run")["ppo"] == "done"
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [row["step"] for row in map(json.loads, rows) if "objective/kl" in row] == [1, 2]
    with pytest.raises(ValueError, match=r"holds a run of another recipe .*ppo.gradient_accumulation_steps: 4 there"):
        run(replace(changed, ppo={"gradient_accumulation_steps": 8}), tmp_path / "run")
