"""Attention over packed rows. N tokens of all rows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import save_architecture
from torch import nn

from rlhf_recipes.model.attention import packed_attention
from rlhf_recipes.model.base import load_base
from rlhf_recipes.model.shared import SharedBase
from rlhf_recipes.recipe.values import Base, Lora

LENGTHS = [5, 1, 9, 3]
STARTS = torch.tensor([0, 5, 6, 15, 18], dtype=torch.int32)
HEADS, GROUPS, SIZE = 4, 2, 8  # of the queries, of keys and values, of a head


def test_packed_rows_attend_within_themselves() -> None:
    query, key, value = (torch.randn(1, heads, 18, SIZE) for heads in (HEADS, GROUPS, GROUPS))
    found = packed_attention(query, key, value, STARTS, 9, 0.3)  # (1, N, heads, D)
    start = 0
    for length in LENGTHS:
        row = slice(start, start := start + length)
        shared_key, shared_value = (x[0, :, row].repeat_interleave(HEADS // GROUPS, 0) for x in (key, value))
        weights = 0.3 * query[0, :, row] @ shared_key.mT  # (heads, l, l)
        unseen = torch.ones(length, length).triu(1).bool()
        expected = weights.masked_fill(unseen, -torch.inf).softmax(-1) @ shared_value
        torch.testing.assert_close(found[0, row], expected.transpose(0, 1))


def test_the_kernel_for_all_rows_takes_grouped_heads_and_has_a_gradient() -> None:
    """Its shapes alone, which PyTorch knows on the device `meta`."""
    tensors = [
        torch.empty(1, heads, 18, SIZE, device="meta", dtype=torch.bfloat16, requires_grad=True)
        for heads in (HEADS, GROUPS, GROUPS)
    ]
    found = packed_attention(*tensors, STARTS.to("meta"), 9, None)
    assert found.shape == (1, 18, HEADS, SIZE)
    found.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.shape == tensor.shape for tensor in tensors)


def padded_rows(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (4, 12): rows with padding on both sides."""
    ids, kept = torch.randint(3, 60, (4, 12), device=device), torch.zeros(4, 12, dtype=torch.bool, device=device)
    for row, length in enumerate(LENGTHS):
        kept[row, 2 : 2 + length] = True
    return ids, kept


def outputs_and_gradients(shared: SharedBase, packed: bool) -> list[torch.Tensor]:
    shared.packs_rows = packed
    torch.manual_seed(0)
    with shared.role("critic"), torch.autocast(shared.device.type, enabled=shared.causal.dtype == torch.bfloat16):
        outputs = shared.head_outputs(*padded_rows(shared.device))
        (outputs * torch.linspace(-1, 1, outputs.numel(), device=shared.device).view_as(outputs)).sum().backward()
    found = [outputs.detach(), *(p.grad for p in shared.parameters_of("critic") if p.grad is not None)]
    shared.zero_grad()
    return found


def critic(folder: Path, **base: Any) -> SharedBase:
    shared = SharedBase(load_base(Base(str(save_architecture(folder, "llama")), **base)), Lora(r=4, alpha=8))
    shared.add_role("critic", trainable=True, head=True)
    torch.manual_seed(1)
    for parameter in shared.parameters_of("critic"):
        nn.init.normal_(parameter, std=0.1)
    return shared.train()


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["no checkpointing", "checkpointing", "reentrant"])
def test_packed_rows_have_the_gradients_of_padded_ones(tmp_path: Path, reentrant: bool | None) -> None:
    shared = critic(tmp_path)
    assert shared.packs_rows
    if reentrant is not None:
        shared.activation_checkpointing_enable({"use_reentrant": reentrant})
    packed, padded = (outputs_and_gradients(shared, packed) for packed in (True, False))
    assert len(packed) == 1 + len(shared.parameters_of("critic"))
    for found, expected in zip(packed, padded, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    with torch.no_grad(), shared.role("critic"):
        shared.packs_rows = True
        torch.manual_seed(0)
        assert torch.equal(shared.head_outputs(*padded_rows(shared.device)), packed[0])


@pytest.mark.gpu
def test_on_a_gpu_packed_rows_are_the_padded_ones(tmp_path: Path) -> None:
    shared = critic(tmp_path, dtype="bfloat16")
    assert shared.packs_rows
    packed, padded = (outputs_and_gradients(shared, packed) for packed in (True, False))
    for found, expected in zip(packed, padded, strict=True):
        assert (found - expected).norm() < 0.05 * expected.norm()
