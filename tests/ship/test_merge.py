"""Weights of every architecture, merged, are those of its own checkpoints: plain transformers loads them whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import ARCHITECTURES, save_architecture
from transformers import AutoModelForCausalLM

from rlhf_recipes import Base, Lora
from rlhf_recipes.model.base import load_base
from rlhf_recipes.model.shared import SharedBase
from rlhf_recipes.ship.folder import write_config
from rlhf_recipes.ship.merge import merged_layers, write_shards

# Experts that are one tensor in memory and many on disk, tied embeddings, a scaled head, a mixer without attention.
SOME = ("bloom", "gemma2", "granite", "mamba2", "mixtral", "qwen2_moe")
# A router takes its layer's weight past the adapter on it, so that what is merged is not what was trained. `export`
# measures that, and refuses it.
PAST = ("longcat_flash",)
ROW = torch.tensor([[4, 5, 6, 7, 8, 9]])


def check(folder: Path, architecture: str, **lora: Any) -> None:
    shared = SharedBase(load_base(Base(str(save_architecture(folder / "base", architecture)))), Lora(r=4, **lora))
    shared.add_role("policy", exact=True)
    generator = torch.Generator().manual_seed(0)
    for parameter in shared.parameters_of("policy"):
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    (folder / "out").mkdir()
    write_shards(merged_layers(shared.causal, "policy", torch.float32), folder / "out", 10_000)
    write_config(shared.causal, folder / "out", torch.float32, eos_token_id=2, pad_token_id=0)
    model, loading = AutoModelForCausalLM.from_pretrained(folder / "out", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    with torch.no_grad(), shared.role("policy"):
        wanted, found = (each.eval()(input_ids=ROW, use_cache=False).logits for each in (shared.causal, model))
    with torch.no_grad(), shared.role("base"):
        before = shared.causal(input_ids=ROW, use_cache=False).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (before - wanted).abs().max() > 1e-2, "the adapter changes what is said"


@pytest.mark.parametrize("architecture", SOME)
def test_merged_weights_load(architecture: str, tmp_path: Path) -> None:
    check(tmp_path, architecture)


@pytest.mark.long
@pytest.mark.parametrize("architecture", sorted({*ARCHITECTURES} - {*SOME, *PAST}))
def test_merged_weights_of_every_architecture_load(architecture: str, tmp_path: Path) -> None:
    try:
        check(tmp_path, architecture)
    except ValueError as error:
        if "is not supported" not in str(error):
            raise
        pytest.skip(str(error))


def test_an_adapter_on_a_tied_weight_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is also the weight of another layer"):
        check(tmp_path, "gemma", target_modules=("embed_tokens", "q_proj"))
