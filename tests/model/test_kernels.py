"""Fewer kernels in a step of decoding: how many there are, and that they compute the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import save_architecture
from support.kernels import Kernels
from support.ppo import EOS, PROMPTS, shared_base
from torch import nn

from rlhf_recipes.model.graph import StaticDecoder
from rlhf_recipes.model.shared import SharedBase

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
