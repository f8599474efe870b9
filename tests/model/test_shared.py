"""SharedBase against stand-alone PEFT models, and how a base is loaded, known again and refused."""

import functools
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.constants import HF_HOME
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from support.architectures import save_architecture
from support.tiny_models import ARCHITECTURES, make_tokenizer, save_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from rlhf_recipes.data.tokens import stop_token_id
from rlhf_recipes.model.base import (
    base_config,
    fingerprint,
    load_base,
    load_tokenizer,
    model_path,
    precision,
    write_fingerprint,
)
from rlhf_recipes.model.decode import draw_tokens
from rlhf_recipes.model.shared import SharedBase, lora_config
from rlhf_recipes.recipe.values import Base, Lora
from rlhf_recipes.records.cache import cache_folder
from rlhf_recipes.records.lock import held

LORA = Lora(r=4, alpha=8)
TEMPERATURE = 0.7
ROLES = ("reference", "policy", "reward", "critic")

# A quantized base computes in bfloat16. In float32 its weights are just as quantized, and equality can be told from
# rounding, so every comparison is made there too.
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "nf4": {"quantization": "nf4"},
    "nf4-fp32": {"quantization": "nf4", "dtype": "float32"},
}


@dataclass(frozen=True)
class Setup:
    """A base on disk, and an SFT adapter and a reward model that plain PEFT trained on it (in name only) and saved."""

    base: Base
    tokenizer: PreTrainedTokenizerBase
    found: dict[str, Any]
    sft: Path
    reward: Path

    @property
    def half(self) -> bool:
        return precision(self.base) == torch.bfloat16

    def autocast(self) -> torch.autocast:
        """As the trainers run: bfloat16 autocast where the base is bfloat16."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.half)

    def causal(self, folder: Path, **kwargs: Any) -> PeftModel:
        return PeftModel.from_pretrained(load_base(self.base), str(folder), **kwargs)

    def classifier(self, folder: Path, **kwargs: Any) -> PeftModel:
        model = load_base(self.base, AutoModelForSequenceClassification, num_labels=1)
        return PeftModel.from_pretrained(model, str(folder), **kwargs)

    def shared(self) -> SharedBase:
        """The four roles as PPO attaches them."""
        shared = SharedBase(load_base(self.base), LORA, self.found)
        shared.add_role("reference", self.sft)
        shared.add_role("policy", self.sft, trainable=True)
        shared.add_role("reward", self.reward, head=True)
        shared.add_role("critic", self.reward, trainable=True, head=True)
        return shared


def save_adapter(base: Base, folder: Path, auto_class: type, task: str, seed: int, **kwargs: Any) -> None:
    """A PEFT folder whose adapter (and score head) is random and large enough to change what the base says."""
    config = LoraConfig(
        r=LORA.r,
        lora_alpha=LORA.alpha,
        target_modules="all-linear",
        task_type=task,
        lora_dropout=kwargs.pop("dropout", 0),
    )
    peft = get_peft_model(load_base(base, auto_class, **kwargs), config)
    torch.manual_seed(seed)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name or (parameter.requires_grad and "score" in name):
            nn.init.normal_(parameter, std=0.2)
    peft.save_pretrained(str(folder))


def make_setup(folder: Path, architecture: str, dropout: float = 0.0, **base_fields: Any) -> Setup:
    base = Base(str(folder / "base"), **base_fields)
    if not (folder / "base").is_dir():
        save_model(folder / "base", architecture)
    tokenizer = load_tokenizer(base)
    found = fingerprint(base, tokenizer)
    save_adapter(base, folder / "sft", AutoModelForCausalLM, "CAUSAL_LM", 1, dropout=dropout)
    save_adapter(
        base, folder / "reward", AutoModelForSequenceClassification, "SEQ_CLS", 2, dropout=dropout, num_labels=1
    )
    for adapter in ("sft", "reward"):
        write_fingerprint(folder / adapter, found)
    return Setup(base, tokenizer, found, folder / "sft", folder / "reward")


@pytest.fixture(scope="module")
def setups(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Setup]:
    """`setups(architecture, precision)`: each is made once. They are read, never changed."""

    @functools.cache
    def make(architecture: str = "llama", name: str = "fp32") -> Setup:
        return make_setup(tmp_path_factory.mktemp(f"{architecture}-{name}"), architecture, **PRECISIONS[name])

    return make


@pytest.fixture(scope="module", params=[(a, p) for a in ARCHITECTURES for p in PRECISIONS], ids="-".join)
def each(request: pytest.FixtureRequest, setups: Callable[..., Setup]) -> Setup:
    """Each architecture in each precision."""
    return setups(*request.param)


@pytest.fixture(scope="module")
def each_shared(each: Setup) -> SharedBase:
    """The four roles on each base, for tests that change no weight."""
    return each.shared()


@pytest.fixture
def llama(setups: Callable[..., Setup]) -> Setup:
    return setups("llama", "fp32")


# Prompts of 5, 2 and 3 tokens, responses of 4, 6 and 1.
torch.manual_seed(0)
PROMPTS = [torch.randint(4, 64, (length,)) for length in (5, 2, 3)]
RESPONSES = [torch.randint(4, 64, (length,)) for length in (4, 6, 1)]
ROWS = [torch.cat(pair) for pair in zip(PROMPTS, RESPONSES, strict=True)]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """input_ids and attention_mask (3, 5 + 6), left-padded prompts and right-padded responses; response_mask (3, 6)."""
    ids, kept = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
    for i, (prompt, row) in enumerate(zip(PROMPTS, ROWS, strict=True)):
        start = 5 - len(prompt)
        ids[i, start : start + len(row)] = row
        kept[i, start : start + len(row)] = 1
    return ids, kept, kept[:, 5:].bool()


def right_padded() -> tuple[Tensor, Tensor]:
    """The same rows as a reward model is trained on them: input_ids and attention_mask (3, 9), padded at the right."""
    ids = nn.utils.rnn.pad_sequence(ROWS, batch_first=True)
    return ids, (torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in ROWS])[:, None]).long()


def at_last_token(outputs: Tensor, attention_mask: Tensor) -> Tensor:
    last = (attention_mask * torch.arange(attention_mask.shape[1])).argmax(1, keepdim=True)
    return outputs.gather(1, last)[:, 0]


def in_float32(model: Any, input_ids: Tensor, **inputs: Tensor) -> Tensor:
    """A model's own logits, with its head's product in float32, as the shared base has it."""
    head = model.get_output_embeddings()
    caught: list[Tensor] = []
    hook = head.register_forward_hook(lambda module, args, output: caught.append(args[0]))
    logits = model(input_ids=input_ids, **inputs).logits
    hook.remove()
    if head.weight.dtype == torch.float32:
        return logits
    assert torch.equal(nn.functional.linear(caught[0].to(head.weight.dtype), head.weight, head.bias), logits)
    bias = None if head.bias is None else head.bias.float()
    with torch.autocast("cpu", enabled=False):
        return nn.functional.linear(caught[0].to(head.weight.dtype).float(), head.weight.float(), bias)


def row_by_row(setup: Setup, model: nn.Module) -> list[Tensor]:
    """Response log-probs from a stand-alone model's logits, each row by itself without padding."""
    found = []
    with torch.no_grad(), setup.autocast():
        for prompt, row in zip(PROMPTS, ROWS, strict=True):
            logits = in_float32(model.eval(), row[None])[0, :-1]
            log_probs = (logits / TEMPERATURE).log_softmax(-1)
            found.append(log_probs.gather(1, row[1:, None])[len(prompt) - 1 :, 0])
    return found


def shared_log_probs(setup: Setup, shared: SharedBase, role: str) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), setup.autocast(), shared.role(role):
        log_probs, entropy = shared.eval().log_probs(*batch(), TEMPERATURE, with_entropy=True)
    assert entropy is not None
    return log_probs, entropy


def assert_same(setup: Setup, found: Tensor, expected: Tensor) -> None:
    """Equal to 1e-5 in float32, and to a unit in the last place of bfloat16 (8 significant bits) in bfloat16.

    There the stand-alone classifier rounds its scores to bfloat16, which the shared head does not, and where kernels
    order the sums of padded rows differently, the log-probs are rounded differently too.
    """
    scale = 1 + expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=(2**-8 if setup.half else 1e-5) * scale)


# --- The same numbers as stand-alone models ---------------------------------------------------------------------------


def test_shared_log_probs_equal_those_of_the_stand_alone_model(each: Setup, each_shared: SharedBase) -> None:
    expected = row_by_row(each, each.causal(each.sft))
    without_adapter = row_by_row(each, load_base(each.base))
    assert (torch.cat(expected) - torch.cat(without_adapter)).abs().max() > 1, "the adapter changes what the base says"
    mask = batch()[2]
    for role in ("policy", "reference"):
        log_probs, _ = shared_log_probs(each, each_shared, role)
        assert_same(each, log_probs[mask], torch.cat(expected))
        assert (log_probs[~mask] == 0).all()


def test_without_padding_even_bfloat16_log_probs_are_the_same(each: Setup, each_shared: SharedBase) -> None:
    expected = row_by_row(each, each.causal(each.sft))
    with torch.no_grad(), each.autocast(), each_shared.eval().role("policy"):
        for row, response, wanted in zip(ROWS, RESPONSES, expected, strict=True):
            ones = torch.ones(1, len(row), dtype=torch.long)
            log_probs, _ = each_shared.log_probs(row[None], ones, ones[:, -len(response) :].bool(), TEMPERATURE)
            torch.testing.assert_close(log_probs[0], wanted, rtol=1e-5, atol=1e-5)


def test_shared_rewards_equal_those_of_the_stand_alone_classifier(each: Setup, each_shared: SharedBase) -> None:
    ids, kept = right_padded()
    with torch.no_grad(), each.autocast():
        expected = each.classifier(each.reward).eval()(input_ids=ids, attention_mask=kept).logits[:, 0].float()
        assert expected.std() > 0.1, "the head tells the rows apart"
        for role in ("reward", "critic"):
            with each_shared.eval().role(role):
                assert_same(each, at_last_token(each_shared.head_outputs(ids, kept), kept), expected)
                left, left_kept, _ = batch()  # the layout of a rollout
                assert_same(each, at_last_token(each_shared.head_outputs(left, left_kept), left_kept), expected)


def test_a_saved_role_with_a_head_loads_as_a_plain_peft_classifier(
    each: Setup, each_shared: SharedBase, tmp_path: Path
) -> None:
    each_shared.save_role("critic", tmp_path)
    ids, kept = right_padded()
    with torch.no_grad(), each.autocast():
        found, expected = (
            each.classifier(folder).eval()(input_ids=ids, attention_mask=kept).logits
            for folder in (tmp_path, each.reward)
        )
    assert torch.equal(found, expected)
    assert json.loads((tmp_path / "base.json").read_text()) == each.found


def test_a_saved_policy_loads_as_a_plain_peft_model(each: Setup, each_shared: SharedBase, tmp_path: Path) -> None:
    each_shared.save_role("policy", tmp_path)
    found, expected = (row_by_row(each, each.causal(folder)) for folder in (tmp_path, each.sft))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    again = SharedBase(load_base(each.base), LORA, each.found)
    again.add_role("policy", tmp_path)
    assert torch.equal(shared_log_probs(each, again, "policy")[0], shared_log_probs(each, each_shared, "policy")[0])


def test_policy_and_reference_start_at_a_kl_of_exactly_zero(each: Setup, each_shared: SharedBase) -> None:
    policy, reference = (shared_log_probs(each, each_shared, role) for role in ("policy", "reference"))
    assert all(torch.equal(a, b) for a, b in zip(policy, reference, strict=True))


def test_role_base_is_the_model_without_any_adapter(each: Setup, each_shared: SharedBase) -> None:
    ids, kept, _ = batch()
    bare = load_base(each.base).eval()
    position_ids = (kept.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), each.autocast(), each_shared.eval().role("base"):
        found = each_shared.logits(each_shared.states(ids, kept))
        expected = in_float32(bare, ids, attention_mask=kept, position_ids=position_ids)
    assert_same(each, found, expected[kept.bool()])


# --- Gradients --------------------------------------------------------------------------------------------------------

torch.manual_seed(3)
UPSTREAM = torch.randn(3, 6)  # what the loss hands back to each response token


def checkpoints(model: torch.nn.Module) -> bool:
    """Whether any of its layers runs its forward again."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def stand_alone_gradients(setup: Setup) -> dict[str, dict[str, Tensor]]:
    """Gradients of policy and critic as two models of their own, by the name that PEFT saves a weight by."""
    ids, kept, mask = batch()
    position_ids = (kept.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": kept, "position_ids": position_ids}
    policy = setup.causal(setup.sft, is_trainable=True).train()
    critic = setup.classifier(setup.reward, is_trainable=True).train()
    assert not checkpoints(policy)
    disable_model_dropout(policy)
    disable_model_dropout(critic)
    with setup.autocast():
        logits = policy(**inputs).logits[:, 4:-1].float()
        hidden = critic(**inputs, output_hidden_states=True).hidden_states[-1]
    log_probs = (logits / TEMPERATURE).log_softmax(-1).gather(2, ids[:, 5:, None])[..., 0]
    (UPSTREAM * log_probs)[mask].sum().backward()
    (score,) = (p for name, p in critic.named_parameters() if p.requires_grad and "score" in name)
    (UPSTREAM * (hidden.float() @ score[0].float())[:, 5:])[mask].sum().backward()
    return {"policy": gradients(policy, "default"), "critic": gradients(critic, "default")}


def disable_model_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def gradients(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Gradients of an adapter's weights and of its score head, by the module's path inside the model."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (f".{adapter}." in name or name == f"heads.{adapter}.weight"):
            assert parameter.grad is not None, name
            key = (
                "score"
                if "score" in name or name.startswith("heads.")
                else name.removeprefix("causal.").removeprefix("base_model.model.")
            )
            found[key.replace(f".{adapter}.", ".")] = parameter.grad.float()
    return found


def policy_loss(shared: SharedBase) -> Tensor:
    log_probs, _ = shared.log_probs(*batch(), TEMPERATURE)
    return (UPSTREAM * log_probs).sum()


def critic_loss(shared: SharedBase) -> Tensor:
    ids, kept, mask = batch()
    return (UPSTREAM * shared.head_outputs(ids, kept)[:, 5:])[mask].sum()


def shared_gradients(setup: Setup, shared: SharedBase) -> dict[str, dict[str, Tensor]]:
    """As PPO does it: forward and backward of the policy, then of the critic."""
    shared.zero_grad()
    for role, loss_of in (("policy", policy_loss), ("critic", critic_loss)):
        with shared.train().role(role):
            with setup.autocast():
                loss = loss_of(shared)
            loss.backward()
    return {role: gradients(shared, role) for role in ("policy", "critic")}


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm, of all gradients as one vector."""
    assert found.keys() == expected.keys()
    difference = torch.cat([(found[key] - expected[key]).flatten() for key in expected])
    return (difference.norm() / torch.cat([g.flatten() for g in expected.values()]).norm()).item()


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["off", "non-reentrant", "reentrant"])
@pytest.mark.parametrize(
    "name",
    [("llama", "fp32"), ("gpt2", "fp32"), ("gpt_neox", "fp32"), ("llama", "nf4-fp32"), ("llama", "nf4")],
    ids="-".join,
)
def test_gradients_equal_those_of_stand_alone_models(
    setups: Callable[..., Setup], name: tuple[str, str], checkpointing: bool | None
) -> None:
    setup = setups(*name)
    shared = setup.shared()
    if checkpointing is not None:
        shared.activation_checkpointing_enable({"use_reentrant": checkpointing})
        assert checkpoints(shared.causal)
    found, expected = shared_gradients(setup, shared), stand_alone_gradients(setup)
    assert len(expected["critic"]) == len(expected["policy"]) + 1, "the same A and B, and the head"
    for role in ("policy", "critic"):
        assert all(gradient.abs().max() > 0 for gradient in found[role].values())
        # In bfloat16 the policy's rounds twice: for each token's own gradient, and for that times the upstream's.
        assert relative_error(found[role], expected[role]) < (3 * 2**-8 if setup.half else 1e-5)


def test_the_language_model_head_may_not_be_adapted(tmp_path: Path) -> None:
    shared = SharedBase(load_base(Base(str(save_model(tmp_path)))), Lora(target_modules=("q_proj", "lm_head")))
    with pytest.raises(ValueError, match=r"lora\.target_modules must leave the language-model head out"):
        shared.add_role("policy", trainable=True)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("q_proj", "the base has no module 'q_proj'. The base has down_proj, gate_proj, k_proj, o_proj, q_proj,"),
        (("q_proj", "nope"), "the base has no module 'nope'"),
        (("mlp",), "model.layers.0.mlp, which 'mlp' names, is no linear layer"),
        ("(", "'(' is no pattern"),
        ((), "names nothing"),
    ],
)
def test_targets_that_the_base_does_not_have_are_refused_by_name(tmp_path: Path, targets: Any, said: str) -> None:
    model = load_base(Base(str(save_model(tmp_path))))
    with pytest.raises(ValueError, match=r"^lora\.target_modules") as error:
        lora_config(Lora(target_modules=targets), TaskType.CAUSAL_LM, model)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_pattern_in_a_saved_adapter_is_not_matched(tmp_path: Path) -> None:
    """The modules are those of its weights, whatever the pattern: one that is matched without end would hang."""
    base, folder = Base(str(save_model(tmp_path))), tmp_path / "policy"
    shared = SharedBase(load_base(base), replace(LORA, target_modules=r".*\.[qv]_proj"))
    shared.add_role("policy", trainable=True)
    shared.save_role("policy", folder)
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert saved["target_modules"] == r".*\.[qv]_proj"
    hostile = {"target_modules": r"(([a-z_.0-9])+)+!", "exclude_modules": r"(([a-z_.0-9])+)+!"}
    for changes in ({}, hostile, {"exclude_modules": ".*"}):
        (folder / "adapter_config.json").write_text(json.dumps(saved | changes))
        again = SharedBase(load_base(base), LORA)
        again.add_role("policy", folder)
        for key, value in shared.role_state("policy").items():
            assert torch.equal(value, again.role_state("policy")[key])
    (folder / "adapter_config.json").write_text(json.dumps(saved | {"rank_pattern": {r"(([a-z_.0-9])+)+!": 4}}))
    with pytest.raises(ValueError, match=r"adapter_config\.json: the pattern of a rank is none of PEFT's own"):
        SharedBase(load_base(base), LORA).add_role("policy", folder)


def test_under_checkpointing_a_backward_outside_its_role_is_wrong_and_raises_nothing(llama: Setup) -> None:
    expected = stand_alone_gradients(llama)["policy"]
    shared = llama.shared().train()
    shared.activation_checkpointing_enable({"use_reentrant": False})
    with shared.role("policy"):
        loss = policy_loss(shared)
    with shared.role("critic"):
        (loss + critic_loss(shared)).backward()  # recomputes the policy's layers with the critic's adapter
    assert relative_error(gradients(shared, "policy"), expected) > 0.5


def test_attention_on_a_gpu_makes_no_plan_for_each_new_length() -> None:
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_eval_forwards_leave_the_gradients_of_a_4bit_base_as_they_were(setups: Callable[..., Setup]) -> None:
    setup = setups("llama", "nf4")
    shared = setup.shared()
    quantized = [module for module in shared.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    assert len(quantized) == 2 * 7 and not any(module.support_avx512bf16_for_cpu for module in quantized)
    before = shared_gradients(setup, shared)
    for role in (*ROLES, "base"):
        shared_log_probs(setup, shared, role)
    after = shared_gradients(setup, shared)
    for role in before:
        assert all(torch.equal(after[role][key], before[role][key]) for key in before[role])


# --- One base, frozen roles -------------------------------------------------------------------------------------------


def test_there_is_one_copy_of_the_base(each: Setup) -> None:
    base = load_base(each.base)
    alone = {id(p): p.data_ptr() for p in base.parameters()}
    count = sum(p.numel() for p in base.parameters())
    kinds = sorted(type(p).__name__ for p in base.parameters())
    shared = SharedBase(base, LORA, each.found)
    for role in ROLES:
        shared.add_role(
            role, each.sft if role in ("policy", "reference") else each.reward, head=role in ("reward", "critic")
        )

    inside = [p for name, p in shared.named_parameters() if "lora_" not in name and not name.startswith("heads.")]
    assert {id(p): p.data_ptr() for p in inside} == alone
    assert sorted(type(p).__name__ for p in inside) == kinds
    assert ("Params4bit" in kinds) == (each.base.quantization == "nf4")
    adapter = sum(p.numel() for p in shared.parameters_of("policy"))
    assert sum(p.numel() for p in shared.parameters()) == count + 4 * adapter + 2 * 64


def test_the_parameters_of_a_role_are_its_adapter_and_its_head(each: Setup, each_shared: SharedBase) -> None:
    roles = {role: [id(p) for p in each_shared.parameters_of(role)] for role in ROLES}
    assert len(roles["critic"]) == len(roles["policy"]) + 1
    assert len(set().union(*roles.values())) == sum(map(len, roles.values())), "no two roles share a weight"
    trainable = {id(p) for p in each_shared.parameters() if p.requires_grad}
    assert trainable == {*roles["policy"], *roles["critic"]}
    for role in ROLES:
        dtype = torch.float32 if role in ("policy", "critic") else each_shared.causal.dtype
        head = {id(p) for p in each_shared.heads.parameters()}
        for parameter in each_shared.parameters_of(role):
            assert parameter.dtype == (torch.float32 if id(parameter) in head else dtype)


@pytest.mark.parametrize("name", [("llama", "fp32"), ("gpt2", "fp32"), ("llama", "nf4")], ids="-".join)
def test_training_changes_policy_and_critic_and_not_one_bit_else(
    setups: Callable[..., Setup], name: tuple[str, str]
) -> None:
    setup = setups(*name)
    shared = setup.shared()
    before = {key: value.clone() for key, value in shared.state_dict().items()}
    kl_before = shared_log_probs(setup, shared, "reference")[0]
    optimizer = torch.optim.AdamW([p for p in shared.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        shared_gradients(setup, shared)
        optimizer.step()

    trained = {id(p) for role in ("policy", "critic") for p in shared.parameters_of(role)}
    for key, parameter in shared.named_parameters():
        assert parameter.requires_grad == (id(parameter) in trained), key
        assert (parameter.grad is not None) == (id(parameter) in trained), key
    learned = {key for key, parameter in shared.named_parameters(remove_duplicate=False) if id(parameter) in trained}
    for key, value in shared.state_dict().items():
        assert torch.equal(value, before[key]) == (key not in learned), key
    assert torch.equal(shared_log_probs(setup, shared, "reference")[0], kl_before)
    assert not torch.equal(shared_log_probs(setup, shared, "policy")[0], kl_before)


# --- The switch -------------------------------------------------------------------------------------------------------


def active_adapters(shared: SharedBase) -> set[tuple[str, ...]]:
    return {tuple(layer.active_adapters) for layer in shared._tuner_layers}


def test_the_role_is_the_same_in_every_layer(each_shared: SharedBase) -> None:
    for role in ROLES:
        with each_shared.role(role):
            assert active_adapters(each_shared) == {(role,)} and each_shared.active == role
    with each_shared.role("base"):
        assert active_adapters(each_shared) == {()} and each_shared.active == "base"


def test_roles_nest_and_come_back_after_an_exception(llama: Setup) -> None:
    shared = llama.shared()
    with shared.role("critic"):
        with pytest.raises(RuntimeError, match="on purpose"), shared.role("policy"), shared.role("base"):
            assert shared.active == "base"
            raise RuntimeError("on purpose")
        assert active_adapters(shared) == {("critic",)}
        with shared.role("reward"):
            assert shared.active == "reward"
        assert shared.active == "critic"


def test_a_role_that_does_not_exist_is_not_the_base(llama: Setup) -> None:
    with pytest.raises(AssertionError, match="there is no role 'polcy'"), llama.shared().role("polcy"):
        pass


def test_switching_leaves_requires_grad_alone(llama: Setup) -> None:
    shared = llama.shared()
    before = {name: parameter.requires_grad for name, parameter in shared.named_parameters()}
    for role in (*ROLES, "base"):
        with shared.role(role):
            assert {name: parameter.requires_grad for name, parameter in shared.named_parameters()} == before
    assert {name: parameter.requires_grad for name, parameter in shared.named_parameters()} == before


@pytest.mark.parametrize("name", [("llama", "fp32"), ("llama", "nf4"), ("gpt2", "fp32")], ids="-".join)
def test_dropout_is_off_for_every_role(tmp_path: Path, name: tuple[str, str]) -> None:
    save_model(tmp_path / "base", name[0])
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    rates = {"llama": ("attention_dropout",), "gpt2": ("attn_pdrop", "resid_pdrop", "embd_pdrop")}[name[0]]
    assert set(rates) <= config.keys()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | dict.fromkeys(rates, 0.1)))
    setup = make_setup(tmp_path, name[0], dropout=0.5, **PRECISIONS[name[1]])
    shared = setup.shared()
    with torch.no_grad(), setup.autocast():
        for role in (*ROLES, "base"):
            with shared.role(role):
                expected = shared.eval().states(*batch()[:2])
                assert torch.equal(shared.train().states(*batch()[:2]), expected), role
        bare = load_base(setup.base).train()
        first, second = (bare(input_ids=batch()[0]).logits for _ in range(2))
        assert not torch.equal(first, second), "the base does drop out by itself"


# --- Heads on a borrowed adapter, biases, copies ----------------------------------------------------------------------


def test_dropout_that_is_no_module_is_off_too(tmp_path: Path) -> None:
    model = SharedBase(load_base(Base(str(save_architecture(tmp_path, "opt")), dtype="float32")), LORA)
    model.add_role("policy", trainable=True)
    model.train()
    ids, mask = torch.arange(4, 12)[None], torch.ones(1, 8, dtype=torch.long)
    with model.role("policy"):
        assert torch.equal(model.states(ids, mask), model.states(ids, mask))


def test_a_head_on_another_roles_adapter_reads_it_and_is_saved_with_it(llama: Setup, tmp_path: Path) -> None:
    shared, (ids, kept) = llama.shared(), right_padded()
    shared.add_head("probe", on="policy")
    with torch.no_grad():
        shared.head_weight("probe").copy_(torch.randn(1, shared.head_weight("probe").shape[1]))
    with shared.role("policy"), torch.no_grad():
        expected = (shared.states(ids, kept) * shared.head_weight("probe")).sum(-1)
    with shared.role("probe"):
        assert shared.active == "probe" and active_adapters(shared) == {("policy",)}
        found = shared.head_outputs(ids, kept)
        found.sum().backward()
    torch.testing.assert_close(found[kept.bool()], expected)
    assert all(p.grad is None for p in shared.parameters_of("policy"))
    assert shared.head_weight("probe").grad is not None
    assert [id(p) for p in shared.parameters_of("probe")] == [id(shared.head_weight("probe"))]

    shared.save_role("probe", tmp_path)
    classifier = PeftModel.from_pretrained(
        load_base(llama.base, AutoModelForSequenceClassification, num_labels=1), str(tmp_path)
    ).eval()
    with torch.no_grad():
        alone = classifier(input_ids=ids, attention_mask=kept).logits[:, 0]
    torch.testing.assert_close(at_last_token(found, kept), alone, rtol=0, atol=1e-5)


def test_a_bias_is_added_to_a_score_and_goes_where_the_adapter_goes(llama: Setup, tmp_path: Path) -> None:
    shared, (ids, kept) = llama.shared(), right_padded()
    with shared.role("reward"), torch.no_grad():
        plain = shared.scores(ids, kept)
    shared.biases["reward"] = -1.5
    shared.save_role("reward", tmp_path)
    shared.add_role("again", tmp_path, head=True)
    for role in ("reward", "again"):
        with shared.role(role), torch.no_grad():
            torch.testing.assert_close(shared.scores(ids, kept), plain - 1.5)
    assert json.loads((tmp_path / "score_bias.json").read_text()) == {"bias": -1.5}


def test_a_copy_goes_a_share_of_the_way(llama: Setup) -> None:
    shared = llama.shared()
    start, policy = ([p.clone() for p in shared.parameters_of(role)] for role in ("reference", "policy"))
    for p in policy:
        p.data.add_(1.0)
    for p, value in zip(shared.parameters_of("policy"), policy, strict=True):
        p.data.copy_(value)
    shared.copy_role("policy", "reference", 0.25)
    for found, a, b in zip(shared.parameters_of("reference"), start, policy, strict=True):
        torch.testing.assert_close(found.data, (0.75 * a + 0.25 * b).data)
        assert not found.requires_grad
    shared.copy_role("policy", "reference")
    assert all(map(torch.equal, shared.parameters_of("reference"), policy))


# --- Generation -------------------------------------------------------------------------------------------------------

STOPS = torch.tensor([2])
torch.manual_seed(4)
UNIFORMS = torch.rand(3, 8, dtype=torch.float64)


def test_generation_is_from_the_active_role(each: Setup, each_shared: SharedBase) -> None:
    """Each token is the one that the stand-alone model, without a cache, draws by the same random number."""
    ids, kept = (values[:, :5] for values in batch()[:2])
    same = {}
    for role, model in (("policy", each.causal(each.sft)), ("base", load_base(each.base))):
        with torch.no_grad(), each.autocast(), each_shared.role(role):
            responses = each_shared.generate(ids, kept, UNIFORMS, TEMPERATURE, STOPS)
            if role == "policy":
                policy = responses
            same[role] = []
            for prompt, response, uniforms in zip(PROMPTS, responses, UNIFORMS, strict=True):
                response = response[: [*response.tolist(), 2].index(2) + 1]
                uniforms = uniforms[: len(response)]
                logits = model.eval()(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1].float()
                same[role].append(draw_tokens(logits / TEMPERATURE, uniforms) == response)
        share = torch.cat(same[role]).float().mean()
        assert share == 1 if not each.half else share > 0.85, "bfloat16 may move a token's edge over its number"
    assert not torch.equal(policy, responses), "the adapter changes what is said"


@pytest.mark.parametrize("training", [True, False])
def test_generation_gives_the_training_mode_back(llama: Setup, training: bool) -> None:
    shared = llama.shared().train(training)
    ids, kept, _ = batch()
    shared.generate(ids[:, :5], kept[:, :5], UNIFORMS, 1.0, STOPS)
    assert {module.training for module in shared.modules()} == {training}
    with pytest.raises(AttributeError):
        shared.generate(ids, kept, "no random numbers", 1.0, STOPS)  # type: ignore[arg-type]
    assert {module.training for module in shared.modules()} == {training}


def test_the_models_own_generation_config_does_not_warp_the_samples(tmp_path: Path) -> None:
    """4,000 samples of one token follow the policy's distribution, to the total variation that chance allows."""
    base = Base(str(save_model(tmp_path)))
    warping = GenerationConfig(do_sample=True, top_k=1, repetition_penalty=5.0, bos_token_id=1, eos_token_id=2)
    warping.save_pretrained(tmp_path)
    config = GenerationConfig(
        do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, max_new_tokens=1, pad_token_id=0, eos_token_id=2
    )
    prompt = torch.arange(4, 24)[None]
    assert load_base(base).generation_config.repetition_penalty == 5.0
    with torch.no_grad():
        exact = (load_base(base).eval()(input_ids=prompt).logits[0, -1] / TEMPERATURE).softmax(-1)

    def distance(generate: Callable[[Tensor, Tensor], Tensor]) -> float:
        torch.manual_seed(0)
        rows = prompt.expand(4000, -1)
        counts = generate(rows, torch.ones_like(rows))[:, -1].bincount(minlength=len(exact))
        return 0.5 * (counts / len(rows) - exact).abs().sum().item()

    shared = SharedBase(load_base(base), LORA)
    shared.add_role("policy")
    # The expected distance is at most sqrt(V / (2 pi N)) = 0.05 for V = 64 tokens and N samples.
    uniforms = torch.rand(4000, 1, dtype=torch.float64)
    assert distance(lambda ids, kept: shared.generate(ids, kept, uniforms, TEMPERATURE, STOPS)) < 0.07
    # transformers' own generate reads no more of it.
    assert distance(lambda ids, kept: shared.causal.generate(ids, attention_mask=kept, generation_config=config)) < 0.07
    bare: Any = load_base(base)
    assert distance(lambda ids, kept: bare.generate(ids, attention_mask=kept, generation_config=config)) > 0.2


# --- Knowing a base again ---------------------------------------------------------------------------------------------


def test_a_fingerprint_does_not_depend_on_the_folder(llama: Setup, tmp_path: Path) -> None:
    moved = shutil.copytree(llama.base.model, tmp_path / "elsewhere")
    base = replace(llama.base, model=str(moved))
    assert fingerprint(base, load_tokenizer(base)) == llama.found
    assert json.loads(json.dumps(llama.found)) == llama.found


def other_weights(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    save_model(folder, seed=1)
    return {}


def other_configuration(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    return {}


def other_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    tokenizer.add_tokens(["another"])
    return {}


def other_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    tokenizer.chat_template = "{{ messages }}"
    return {}


DIFFERENCES: dict[str, tuple[set[str], Callable[..., dict[str, Any]]]] = {
    "weights": ({"model"}, other_weights),
    "configuration": ({"model"}, other_configuration),
    "tokenizer": ({"tokenizer"}, other_tokenizer),
    "chat template": ({"chat_template"}, other_template),
    "dtype": ({"dtype"}, lambda *_: {"dtype": "bfloat16"}),
    "quantization": ({"quantization", "dtype"}, lambda *_: {"quantization": "nf4"}),
    "quantization alone": ({"quantization"}, lambda *_: {"quantization": "int8", "dtype": "float32"}),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_a_fingerprint_tells_bases_apart_and_an_adapter_of_another_is_refused(
    llama: Setup, tmp_path: Path, what: str
) -> None:
    folder = Path(shutil.copytree(llama.base.model, tmp_path / "base"))
    tokenizer = load_tokenizer(llama.base)
    keys, change = DIFFERENCES[what]
    base = replace(llama.base, model=str(folder), **change(folder, tokenizer))
    found = fingerprint(base, tokenizer)
    assert {key for key in found if found[key] != llama.found[key]} == keys

    shared = SharedBase(load_base(llama.base), LORA, found)
    with pytest.raises(ValueError, match="was trained on another base") as refusal:
        shared.add_role("policy", llama.sft)
    for key in found:
        assert (f"{key}: {llama.found[key]} there, {found[key]} here" in str(refusal.value)) == (key in keys)
    assert str(llama.sft) in str(refusal.value)


def test_a_fingerprint_is_of_the_last_byte_too(llama: Setup, tmp_path: Path) -> None:
    """Two merges of one base may differ in late layers alone."""
    folder = Path(shutil.copytree(llama.base.model, tmp_path / "base"))
    models = []
    for last in (b"a", b"b"):
        (folder / "model-2.safetensors").write_bytes(b"\0" * 2**20 + last)
        models.append(fingerprint(replace(llama.base, model=str(folder)), llama.tokenizer)["model"])
    assert models[0] != models[1]


def test_an_adapter_without_a_fingerprint_is_refused(llama: Setup, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama.sft, tmp_path / "sft"))
    (folder / "base.json").unlink()
    with pytest.raises(ValueError, match=r"sft/base\.json is missing"):
        SharedBase(load_base(llama.base), LORA, llama.found).add_role("policy", folder)


def test_a_role_with_a_head_refuses_a_folder_without_one(llama: Setup) -> None:
    with pytest.raises(ValueError, match="has no score head: it is not a reward model"):
        llama.shared().add_role("second", llama.sft, head=True)


@pytest.mark.parametrize(
    "lora", [replace(LORA, r=8), replace(LORA, target_modules=("q_proj",))], ids=["rank", "targets"]
)
def test_load_role_refuses_an_adapter_of_another_shape_and_changes_nothing(
    llama: Setup, tmp_path: Path, lora: Lora
) -> None:
    other = SharedBase(load_base(llama.base), lora, llama.found)
    other.add_role("policy")
    other.save_role("policy", tmp_path)
    shared = llama.shared()
    before = [p.clone() for p in shared.parameters_of("policy")]
    with pytest.raises(ValueError, match=r"does not fit"):
        shared.load_role("policy", tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, shared.parameters_of("policy"), strict=True))


def test_a_fresh_role_changes_nothing_and_its_head_is_zero(llama: Setup) -> None:
    shared = SharedBase(load_base(llama.base), LORA)
    shared.add_role("critic", trainable=True, head=True)
    ids, kept, _ = batch()
    with torch.no_grad():
        with shared.role("base"):
            expected = shared.states(ids, kept)
        with shared.role("critic"):
            assert torch.equal(shared.states(ids, kept), expected)
            assert (shared.head_outputs(ids, kept) == 0).all()


# --- Loading ----------------------------------------------------------------------------------------------------------

TURNS = "{%- for message in messages %}{{ '<turn> ' + message.content + ' <end> ' }}{% endfor %}"


def no_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.pad_token = None


def padding_is_the_end_of_a_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>", "<end>"]})
    tokenizer.chat_template = TURNS
    tokenizer.pad_token = "<end>"


def no_padding_and_no_unknown_token(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.pad_token = tokenizer.unk_token = None


def padding_is_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.pad_token = tokenizer.eos_token


def everything_is_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.pad_token = tokenizer.unk_token = tokenizer.bos_token = tokenizer.eos_token


@pytest.mark.parametrize(
    "change",
    [no_padding, no_padding_and_no_unknown_token, padding_is_eos, padding_is_the_end_of_a_turn, everything_is_eos],
    ids=lambda change: change.__name__.replace("_", " "),
)
def test_padding_never_ends_a_response(tmp_path: Path, change: Callable[[PreTrainedTokenizerBase], None]) -> None:
    save_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    change(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(Base(str(tmp_path)))
    ends = [loaded.eos_token_id, *(stop_token_id(loaded, conversational) for conversational in (True, False))]
    assert loaded.pad_token_id is not None and loaded.pad_token_id not in ends
    assert len(loaded) == len(tokenizer), "no token was added: the base has no embedding for it"
    assert loaded.padding_side == "left"


def test_a_padding_token_of_its_own_is_kept(llama: Setup) -> None:
    assert llama.tokenizer.pad_token == "<pad>" == make_tokenizer().pad_token


def test_a_base_names_no_code_of_the_hub(tmp_path: Path) -> None:
    save_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attn_implementation": "their/kernel"}))
    with pytest.raises(ValueError, match="its configuration names their/kernel, code of the Hub"):
        load_base(Base(str(tmp_path)))
    load_base(Base(str(tmp_path), attn_implementation="sdpa"))


def test_a_base_without_eos_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no EOS token"):
        load_tokenizer(Base(str(tmp_path)))


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({}, torch.float32),
        ({"quantization": "nf4"}, torch.bfloat16),
        ({"quantization": "int8"}, torch.bfloat16),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "float32"}, torch.float32),
        ({"dtype": "float32", "quantization": "nf4"}, torch.float32),
        ({"dtype": "bfloat16", "quantization": "nf4"}, torch.bfloat16),
    ],
    ids=str,
)
def test_the_precision_on_a_cpu(monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], dtype: torch.dtype) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert precision(Base("model", **fields)) == dtype


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_loaded_base_is_frozen_and_has_the_precision_asked_for(setups: Callable[..., Setup], name: str) -> None:
    setup = setups("llama", name)
    base = load_base(setup.base)
    assert base.dtype == precision(setup.base)
    assert not any(parameter.requires_grad for parameter in base.parameters())


BUILDER = """\
from support.tiny_models import save_model

calls = []

def build(folder):
    calls.append(folder)
    save_model(folder)

def fail(folder):
    folder.mkdir()
    (folder / "half").touch()
    raise OSError("disk full")
"""


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module `built_base` whose functions make a base; the path of a cache of this test's own."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "built_base.py").write_text(BUILDER)
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.delitem(sys.modules, "built_base", raising=False)
    monkeypatch.setenv("RLHF_RECIPES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_base_that_a_function_builds_is_built_once(builder: Path) -> None:
    base = Base("built_base:build")
    import built_base  # type: ignore[import-not-found]

    folder = model_path(base)
    assert Path(folder).parent == builder and folder == model_path(base)
    assert load_base(base).config.hidden_size == 64 and load_tokenizer(base).eos_token == "<eos>"
    assert len(built_base.calls) == 1
    assert {path.name for path in builder.iterdir()} == {Path(folder).name, f".{Path(folder).name}.built.lock"}
    assert fingerprint(base, load_tokenizer(base)) == fingerprint(Base(folder), load_tokenizer(Base(folder)))


def test_two_first_runs_at_once_build_one_base_and_who_waits_says_for_whom(
    builder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import built_base  # type: ignore[import-not-found]

    with ThreadPoolExecutor(2) as threads:
        folders = list(threads.map(model_path, [Base("built_base:build")] * 2))
    assert folders[0] == folders[1] and len(built_base.calls) == 1
    shutil.rmtree(folders[0])
    with ThreadPoolExecutor(1) as thread:
        with held(Path(f"{folders[0]}.built")):
            waiting = thread.submit(model_path, Base("built_base:build"))
            printed = ""
            while "Waiting" not in printed:
                time.sleep(0.01)
                printed += capsys.readouterr().err
        assert waiting.result() == folders[0]
    assert re.search(rf"in use by process {os.getpid()} of \S+ on \S+, since \S+ Waiting for it\.", printed)


def test_a_builder_that_fails_leaves_nothing_behind(builder: Path) -> None:
    with pytest.raises(OSError, match="disk full"):
        model_path(Base("built_base:fail"))
    assert [path.suffix for path in builder.iterdir()] == [".lock"]


def test_the_cache_is_beside_the_hugging_face_cache_unless_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_RECIPES_CACHE", "~/somewhere")
    assert cache_folder() == Path.home() / "somewhere"
    monkeypatch.delenv("RLHF_RECIPES_CACHE")
    assert cache_folder() == Path(HF_HOME).parent / "rlhf_recipes"


def test_a_base_that_is_not_there_or_has_code_is_named_by_its_setting(tmp_path: Path) -> None:
    for name in ("nobody/nothing", str(tmp_path)):
        for read in (load_tokenizer, base_config):
            with pytest.raises(ValueError, match=rf"^base\.model={name}: it cannot be read \(.*\)\. Name a model"):
                read(Base(name))
    auto = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(auto))
    with pytest.raises(ValueError, match=r"it has code of its own: set base\.trust_remote_code=True"):
        base_config(Base(str(tmp_path)))
