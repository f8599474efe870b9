"""Fewer kernels in a step of decoding: how many there are, and that they compute the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import save_architecture
from support.kernels import Kernels
from support.ppo import EOS, PROMPTS, shared_base
from torch import Tensor, nn
from transformers.models.cohere import modeling_cohere
from transformers.models.gemma import modeling_gemma
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama

from rlhf_recipes.model.fused import ROTARY, Fused, Rotary, is_rms_norm, is_rotary
from rlhf_recipes.model.graph import StaticDecoder
from rlhf_recipes.model.shared import SharedBase
from rlhf_recipes.model.static_adapters import StaticAdapters

CEILING = {None: 28, "nf4": 31}  # kernels of a layer and token, of a plain and of a quantized base
DTYPE = {None: "float32", "nf4": "bfloat16"}


def build(folder: Path, architecture: str = "llama", quantization: str | None = None, **settings: Any) -> SharedBase:
    """Random roles on a model whose products are wide enough for NF4."""
    save_architecture(folder, architecture, hidden_size=64, intermediate_size=128, **settings)
    return shared_base(folder, policy_seed=2, quantization=quantization, dtype=DTYPE[quantization]).eval()


def steps_of(model: SharedBase, rows: int = 3) -> StaticDecoder:
    made = StaticDecoder(model, rows, 64, 4, 1.0, torch.tensor([EOS], device=model.device))
    made.enter(list(range(rows)), PROMPTS[:rows], torch.full((rows, 4), 0.5, dtype=torch.float64))
    return made


def kernels(model: SharedBase) -> int:
    with model.role("policy"), torch.no_grad():
        steps = steps_of(model)
        with steps.stepping():
            steps.step(3)
            with Kernels() as counted:
                steps.step(3)
    return counted.counts.total()


def test_what_is_counted() -> None:
    x = torch.ones(2, 4)
    with Kernels() as counted:
        x[:, :2].add_(x.new_empty(2, 2)).T.detach()
        nn.functional.rms_norm(x, (4,)).mul(2)
    assert +counted.counts == {"add_": 1, "rms_norm": 1, "mul": 1}


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize(
    ("architecture", "settings"), [("llama", {}), ("mistral", {"sliding_window": None}), ("qwen2", {})]
)
def test_a_layer_takes_no_more_kernels(
    architecture: str, settings: dict[str, Any], quantization: str | None, tmp_path: Path
) -> None:
    two, three = (
        kernels(build(tmp_path / str(layers), architecture, quantization, num_hidden_layers=layers, **settings))
        for layers in (2, 3)
    )
    assert three - two <= CEILING[quantization]


# --- The same results -------------------------------------------------------------------------------------------------


class OtherNorm(modeling_llama.LlamaRMSNorm):
    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(hidden_states)


def test_a_norm_and_a_rotation_that_compute_something_else_are_left() -> None:
    assert is_rms_norm(modeling_llama.LlamaRMSNorm(8, 1e-6), 1e-6, torch.float32)
    for other, eps in (
        (modeling_gemma.GemmaRMSNorm(8, 1e-6), 1e-6),  # it scales by 1 and the weight
        (modeling_llama.LlamaRMSNorm(8, 1e-6), 1e-5),
        (OtherNorm(8, 1e-6), 1e-6),
    ):
        assert not is_rms_norm(other, eps, torch.float32)
    assert is_rotary(modeling_llama.apply_rotary_pos_emb)
    for file in (modeling_cohere, modeling_gpt_oss):  # neighbours as pairs; cosines of half a head
        assert not is_rotary(getattr(file, ROTARY))


def test_a_rotation_of_a_part_of_each_head_is_the_architectures_own() -> None:
    rotary = Rotary(lambda *given, **named: (given, named))
    q, k, cos, sin = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8), torch.ones(1, 3, 4), torch.ones(1, 3, 4)
    assert rotary(q, k, cos, sin)[0] == (q, k, cos, sin)
    assert rotary(q, k, q[0], q[0], unsqueeze_dim=2)[1] == {"unsqueeze_dim": 2}


def test_the_signs_are_those_of_the_sines_that_are_given() -> None:
    rotary, expected = Rotary(None), modeling_llama.apply_rotary_pos_emb
    for _ in range(2):
        q, k, cos, sin = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
        torch.testing.assert_close(rotary(q, k, cos, sin), expected(q, k, cos, sin))


def test_short_forms_are_there_within_and_no_random_number_is_drawn(tmp_path: Path) -> None:
    model, state = build(tmp_path), torch.get_rng_state()
    forms = Fused(model.backbone)
    assert len(forms.norms) == 5 and forms.files == [modeling_llama]
    before, ids = modeling_llama.apply_rotary_pos_emb, torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        expected = model.states(ids, torch.ones_like(ids))
        with forms.installed():
            assert isinstance(modeling_llama.apply_rotary_pos_emb, Rotary)
            torch.testing.assert_close(model.states(ids, torch.ones_like(ids)), expected)
    assert modeling_llama.apply_rotary_pos_emb is before
    assert not any("forward" in vars(norm) for norm, _ in forms.norms)
    assert torch.equal(torch.get_rng_state(), state)


def names(model: SharedBase) -> list[list[str]]:
    found = {layer: name.rpartition(".")[2] for name, layer in model.named_modules()}
    return [[found[layer] for layer in layers] for layers in model.siblings]


def test_siblings_are_what_one_module_gives_one_tensor(tmp_path: Path) -> None:
    expected = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert names(build(tmp_path)) == 2 * expected


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_siblings_given_other_tensors_compute_their_own(quantization: str | None, tmp_path: Path) -> None:
    model = build(tmp_path, "qwen2", quantization)
    adapters, (q, k, v) = StaticAdapters(model), model.siblings[0]
    adapters.refresh("policy")
    x, y = torch.randn(2, 2, 3, 64, dtype=model.causal.dtype)
    with model.role("policy"), torch.no_grad():
        expected = {(layer, given): layer(given) for layer in (q, k, v) for given in (x, y)}
        with adapters.installed():
            for order in ([(q, x), (k, x), (v, x)], [(q, x), (k, y), (v, x)], [(v, y)], [(q, x), (q, y), (k, y)]):
                for layer, given in order:
                    torch.testing.assert_close(layer(given), expected[layer, given], rtol=0.02, atol=0.02)
            q(x)
            x.neg_()  # what is written into the same tensor is read when the first is called again
            torch.testing.assert_close(q(x), layer_of(q, x), rtol=0.02, atol=0.02)


def layer_of(layer: Any, x: Tensor) -> Tensor:
    """A layer's output by its own weights."""
    a, b = layer.lora_A["policy"].weight, layer.lora_B["policy"].weight
    return layer.base_layer(x) + (layer.scaling["policy"] * x.float() @ a.T @ b.T).to(x.dtype)
