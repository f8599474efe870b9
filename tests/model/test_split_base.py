"""A base whose layers lie on two devices says, learns and saves what it does on one."""

import functools
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft.peft_model
import pytest
import torch
from peft import PeftModel
from support import processes
from support.architectures import save_architecture
from support.devices import FIRST, SECOND, OnSecond, TwoDevices
from support.ppo import PROMPTS, ppo_config, sampler, shared_base
from support.processes import CASES, train_case
from support.tiny_models import ARCHITECTURES, save_model
from support.worded import make_recipe, weights
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_recipes import load, replace, run
from rlhf_recipes.model.base import load_base
from rlhf_recipes.model.processes import join, visible_gpus
from rlhf_recipes.model.shared import SharedBase
from rlhf_recipes.model.split import check_split, layer_map
from rlhf_recipes.recipe.values import Base, DPOStage
from rlhf_recipes.stages.configure import configure
from rlhf_recipes.stages.ppo.trainer import check_fit

LONG = pytest.mark.long
ONE, SPLIT = {"dtype": "float32"}, {"dtype": "float32", "split": "layers"}
UNIFORMS = torch.rand(len(PROMPTS), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
OTHERS = ("val/clipfrac_avg",)  # on the first pass the clipped error is the error, but for rounding
OTHERS += (
    "time/",
    "tokens_per_second",
    "memory/",
    "train_",
    "eval_runtime",
    "eval_samples",
    "eval_steps",
    "total_flos",
)


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Within it bases that say so are split over two devices."""
    monkeypatch.setattr("rlhf_recipes.model.split.cards", lambda: [FIRST, SECOND])
    return TwoDevices()


def held(tensor: Tensor) -> Tensor:
    """A tensor on the first device, wherever it is."""
    return tensor.held if isinstance(tensor, OnSecond) else tensor


def said(model: SharedBase) -> dict[str, Tensor]:
    """What its roles sample, and what they make of it."""
    samples = sampler(model).sample("policy", PROMPTS, UNIFORMS)
    log_probs, entropies = sampler(model).log_probs("policy", samples, with_entropy=True)
    found = {"ids": samples.input_ids, "log_probs": log_probs, "entropies": entropies}
    found["reference"] = sampler(model).log_probs("reference", samples)[0]
    return found | {"values": sampler(model).values(samples), "scores": sampler(model).reward_scores(samples)}


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def check_same(folder: Path, mode: Any, tolerance: float = 2e-6, **base: Any) -> None:
    """All that is said is the same to rounding: attention of the tensors that we make up has other kernels."""
    one = said(shared_base(folder, **{"dtype": "float32"} | base))
    with mode:
        split = said(shared_base(folder, split="layers", **base))
    for name, expected in one.items():
        assert type(split[name]) is Tensor and error(split[name], expected) < tolerance, name


# --- What it says, and its gradients ----------------------------------------------------------------------------------


def test_two_devices_say_what_one_says(tmp_path: Path, two: TwoDevices) -> None:
    check_same(save_model(tmp_path), two)
    assert two.moved > 0


@LONG
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tiny_model_says_the_same(tmp_path: Path, two: TwoDevices, architecture: str) -> None:
    check_same(save_model(tmp_path, architecture), two)


@LONG
@pytest.mark.parametrize("architecture", ["bamba", "cohere2", "gemma3_text", "mamba", "olmoe", "opt", "phi3"])
def test_other_kinds_of_models_say_the_same(tmp_path: Path, two: TwoDevices, architecture: str) -> None:
    check_same(save_architecture(tmp_path, architecture), two)


def test_each_adapter_lies_with_its_layer_and_all_else_on_the_first(tmp_path: Path, two: TwoDevices) -> None:
    with two:
        model = shared_base(save_model(tmp_path), split="layers")
    places = {name: parameter.device for name, parameter in model.named_parameters()}
    assert {name for name, place in places.items() if place == SECOND} == {n for n in places if ".layers.1." in n}
    assert model.device == FIRST and len([key for key in places if ".layers.1." in key and ".critic." in key]) == 14
    given = {}
    for number, layer in enumerate(model.checkpointable):
        layer.register_forward_pre_hook(lambda _, args, number=number: given.update({number: args[0].device}))
    with two:
        hidden = model.states(torch.tensor(PROMPTS[4:5]), torch.ones(1, 9))
    assert (given, hidden.device) == ({0: FIRST, 1: SECOND}, FIRST)
    assert model.static_refusal == "its layers lie on several GPUs"


@pytest.mark.parametrize(
    "checkpointing",
    [pytest.param(None, id="off", marks=LONG), pytest.param(False, id="new"), pytest.param(True, id="old", marks=LONG)],
)
def test_gradients_are_the_same(tmp_path: Path, two: TwoDevices, checkpointing: bool | None) -> None:
    folder, gradients = save_model(tmp_path), []
    for given, mode in ((ONE, nullcontext()), (SPLIT, two)):
        with mode:
            model = shared_base(folder, **given)
            if checkpointing is not None:
                model.activation_checkpointing_enable({"use_reentrant": checkpointing})
            model.train()
            ids = torch.tensor(PROMPTS[4:5] * 2)
            mask, answered = torch.ones_like(ids), torch.ones(2, 4, dtype=torch.bool)
            with model.role("policy"):
                model.log_probs(ids, mask, answered)[0].sum().backward()
            with model.role("critic"):
                model.head_outputs(ids, mask).square().sum().backward()
        gradients.append([held(p.grad) for role in ("policy", "critic") for p in model.parameters_of(role)])
    assert len(gradients[0]) == 2 * 2 * 14 + 1
    assert max(error(split, one) for one, split in zip(*gradients, strict=True)) < 1e-5


def test_a_classifier_is_split_too(tmp_path: Path, two: TwoDevices) -> None:
    folder, ids, scores = save_model(tmp_path), torch.tensor(PROMPTS[4:5]), []
    for given, mode in ((ONE, nullcontext()), (SPLIT, two)):
        torch.manual_seed(0)  # the head is random
        with mode:
            model = load_base(Base(str(folder), **given), AutoModelForSequenceClassification, num_labels=1)
            scores.append(model(input_ids=ids).logits)
    assert len(set(model.hf_device_map.values())) == 2 and error(*scores) < 1e-6


@pytest.mark.parametrize("quantization", ["nf4", pytest.param("int8", marks=LONG)])
def test_a_quantized_base_loads_by_the_same_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    """Here `cpu:1` is the CPU: hooks and copies are made, and what they forget is not found."""
    monkeypatch.setattr("rlhf_recipes.model.split.cards", lambda: [FIRST, SECOND])
    monkeypatch.setattr("accelerate.utils.modeling.check_device_same", lambda one, other: one.type == other.type)
    check_same(save_model(tmp_path), nullcontext(), tolerance=1e-9, quantization=quantization)


# --- Training ---------------------------------------------------------------------------------------------------------


def check_trained(folder: Path, two: TwoDevices, monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> None:
    """A case of PPO leaves the same weights and logs."""
    monkeypatch.setattr(processes, "weights", lambda trainer, role: flat(trainer.model, role))
    for where, given, mode in (("one", ONE, nullcontext()), ("two", SPLIT, two)):
        save_model(folder / where / "model")
        monkeypatch.setattr(processes, "shared_base", functools.partial(shared_base, **given))
        with mode:
            train_case(name, folder / where, **changes)
    one, split = (torch.load(folder / where / f"{name}.pt", weights_only=False) for where in ("one", "two"))
    for role, expected in one["weights"].items():
        assert error(split["weights"][role], expected) < 1e-6, role
    for row, expected in zip(split["logs"], one["logs"], strict=True):
        shown = {key: value for key, value in expected.items() if not key.startswith(OTHERS)}
        assert {key: row[key] for key in shown} == pytest.approx(shown, rel=1e-4, abs=1e-5), name


def flat(model: SharedBase, role: str) -> Tensor:
    """A role's weights in one row, on the first device."""
    return torch.cat([held(parameter.detach()).flatten() for parameter in model.parameters_of(role)]).clone()


def test_ppo_trains_the_same(tmp_path: Path, two: TwoDevices, monkeypatch: pytest.MonkeyPatch) -> None:
    check_trained(tmp_path, two, monkeypatch, "gae", total_episodes=24, gradient_checkpointing=True)


@LONG
@pytest.mark.parametrize("name", CASES)
def test_every_estimator_and_critic_trains_the_same(
    tmp_path: Path, two: TwoDevices, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    check_trained(tmp_path, two, monkeypatch, name)


@LONG
def test_a_run_of_one_device_goes_on_on_two(tmp_path: Path, two: TwoDevices, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"save_strategy": "steps", "save_steps": 2}
    check_trained(tmp_path, two, monkeypatch, "gae", **changes)
    expected = torch.load(tmp_path / "one" / "gae.pt", weights_only=False)["weights"]
    with two:
        train_case("gae", tmp_path / "two", resume=str(tmp_path / "one" / "gae" / "checkpoint-2"), **changes)
    resumed = torch.load(tmp_path / "two" / "gae.pt", weights_only=False)["weights"]
    assert max(error(resumed[role], expected[role]) for role in expected) < 1e-6


def let_peft_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT writes adapters from where they are, and the second device has no addresses."""
    names, save = peft.peft_model.id_tensor_storage, peft.peft_model.safe_save_file
    monkeypatch.setattr("peft.peft_model.id_tensor_storage", lambda tensor: names(held(tensor)))
    monkeypatch.setattr(
        "peft.peft_model.safe_save_file",
        lambda state, *args, **options: save({key: held(value) for key, value in state.items()}, *args, **options),
    )


@LONG
def test_all_stages_train_the_same(tmp_path: Path, two: TwoDevices, monkeypatch: pytest.MonkeyPatch) -> None:
    let_peft_save(monkeypatch)
    made = make_recipe(tmp_path)
    sgd = {"learning_rate": 0.1, "optim": "sgd", "gradient_checkpointing": True}
    dpo = DPOStage(f"{tmp_path}/pairs.jsonl", heldout=0.1, args={**sgd, "max_steps": 2, "response_length": 8})
    recipe = replace(made, sft=sgd, reward=sgd, ppo=sgd, dpo=dpo, rounds=None)
    run(recipe, tmp_path / "None")
    with two:
        run(replace(recipe, base={"split": "layers"}), tmp_path / "layers")
    for stage in ("sft", "reward", "ppo/policy", "ppo/critic", "dpo"):
        one, split = (weights(tmp_path / name / stage) for name in ("None", "layers"))
        assert one.keys() == split.keys() and max(error(split[key], one[key]) for key in one) < 1e-5, stage
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(made.base.model), tmp_path / "layers" / "sft"
    )
    assert {parameter.device for parameter in plain.parameters()} == {FIRST}


# --- Where its parts go -----------------------------------------------------------------------------------------------


def test_the_weights_are_dealt_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 layers of 16 x (4 x 16 + 3 x 32) + 2 x 16 = 2,592 weights; embeddings, head and norm are 2 x 256 x 16 + 16."""
    devices = [torch.device("cuda", number) for number in range(3)]
    monkeypatch.setattr("rlhf_recipes.model.split.cards", lambda: devices)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 8, "vocab_size": 256}
    config = AutoConfig.for_model("llama", **shape, num_attention_heads=2, num_key_value_heads=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    places = layer_map(model, None, torch.float32)
    # A third of all is 9,648. Outside are 8,208: the first has room for 1,440 more, in which layer 0 has its middle.
    numbers = [places[f"model.layers.{number}"].index for number in range(8)]
    assert numbers == [0, 1, 1, 1, 2, 2, 2, 2]
    outside = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    assert {name: places[name] for name in outside} == dict.fromkeys(outside, devices[0])
    assert set(places) == {*outside, *(f"model.layers.{number}" for number in range(8))}
    # In 4 bits a layer is 1,385 bytes, and the 16,416 outside are more than a third of all.
    quantized = layer_map(model, "nf4", torch.bfloat16)
    assert [quantized[f"model.layers.{number}"].index for number in range(8)] == [0, 1, 1, 1, 2, 2, 2, 2]


# --- What is refused --------------------------------------------------------------------------------------------------


def test_a_single_device_is_refused_before_a_weight_is_loaded(tmp_path: Path) -> None:
    recipe = replace(load("tiny"), base={"split": "layers", "model": "no/model"}, tracker="none")
    with pytest.raises(ValueError, match=r"base\.split=layers lays the base over two GPUs or more, and 0 can be seen"):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_recipes.model.split.count", lambda: 2)
    with pytest.raises(ValueError, match="over the GPUs of one process, and there are 2 processes"):
        check_split(Base("a", split="layers"))
    check_split(Base("a"))


def test_on_one_device_the_base_of_a_finished_run_loads_as_any_other(tmp_path: Path) -> None:
    model = load_base(Base(str(save_model(tmp_path)), split="layers"))
    assert {parameter.device for parameter in model.parameters()} == {FIRST} and not hasattr(model, "hf_device_map")


def test_a_single_layer_stays_on_the_first(tmp_path: Path, two: TwoDevices) -> None:
    with two:
        model = load_base(Base(str(save_model(tmp_path, num_hidden_layers=1)), split="layers"))
    assert {parameter.device for parameter in model.parameters()} == {FIRST}


def test_other_ways_to_sample_are_refused() -> None:
    recipe = replace(load("tiny"), base={"split": "layers"}, tracker="none")
    with pytest.raises(ValueError, match=r"ppo\.generation_backend=static samples on one GPU only, .*: set native"):
        configure(replace(recipe, ppo={"generation_backend": "static"}))
    configure(replace(recipe, ppo={"generation_backend": "eager"}))


def test_a_process_that_has_several_gpus_may_train_a_split_base(tmp_path: Path) -> None:
    config = ppo_config(tmp_path)
    config._n_gpu = 2
    with pytest.raises(ValueError, match="wants a process for each GPU"):
        check_fit(config, 100, False)
    check_fit(config, 100, False, split=True)


def test_the_only_process_of_a_split_base_sees_all_gpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("rlhf_recipes.model.processes.visible_gpus", visible_gpus.__wrapped__)  # it is kept
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    join(split=True)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5" and capsys.readouterr().err == ""
    join()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4" and "2 GPUs can be seen" in capsys.readouterr().err
