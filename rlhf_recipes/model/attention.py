"""Attention of our own, registered by name with transformers' AttentionInterface.

A model attends by it while `attends_by` has put that name into its configuration. B rows, C tokens that a cache has
room for, Hq query heads, Hkv heads of keys and values, D the size of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

STATIC = "rlhf_recipes_static"  # the name of `static_attention`
# Arguments by which some architectures ask for more than the product of queries and keys.
BEYOND = ("softcap", "s_aux", "position_bias")


@contextmanager
def attends_by(name: str, decoder: Any) -> Iterator[None]:
    """A text decoder attends by the function of that name."""
    before = decoder.config._attn_implementation
    decoder.config._attn_implementation = name
    try:
        yield
    finally:
        decoder.config._attn_implementation = before


def has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has FlashAttention there: from Ampere (sm80) on, in 16 bits."""
    return device.type == "cuda" and dtype.itemsize == 2 and torch.cuda.get_device_capability(device) >= (8, 0)


def static_mask(lengths: Tensor, capacity: int, flash: bool) -> Tensor:
    """What `static_attention` takes in the place of a mask: how many keys each row's query sees.

    It has four dimensions, because transformers hands such a mask to the layers as it is.

    Args:
        lengths: (B,) int32, 1 or more.
    Returns:
        (B, 1, 1, C) bool; for `flash` (3, 1, 1, B + 1) int32: where each row's queries and its keys begin, and the
        lengths.
    """
    if not flash:
        return (torch.arange(capacity, device=lengths.device) < lengths[:, None])[:, None, None]
    begin = torch.arange(len(lengths) + 1, device=lengths.device, dtype=torch.int32)  # (B + 1,)
    return torch.stack([begin, capacity * begin, nn.functional.pad(lengths, (0, 1))])[:, None, None]


def static_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One query a row over the first keys of a cache of fixed size. None of them is copied.

    Args:
        query: (B, Hq, 1, D). key, value: (B, Hkv, C, D), of which (B, C, Hkv, D) are contiguous.
        attention_mask: see `static_mask`.
        scaling: of the products; None: 1 / sqrt(D).
    Returns:
        (B, 1, Hq, D), and None for the weights.
    Raises:
        NotImplementedError: the architecture caps the products, or adds to them.
    """
    asked = [name for name in BEYOND if kwargs.get(name) is not None]
    if asked:
        raise NotImplementedError(f"its attention has {asked[0]}")
    rows, heads, _, size = query.shape
    if attention_mask.dtype == torch.bool:
        # The query heads of a group stand where the queries of a row do, and share its keys.
        grouped = query.reshape(rows, key.shape[1], -1, size)  # (B, Hkv, Hq / Hkv, D)
        output = nn.functional.scaled_dot_product_attention(grouped, key, value, attention_mask, scale=scaling)
    else:
        # What torch.nn.attention.varlen calls from 2.12 on, without the tensor of zeros that it makes for each layer.
        begin, begin_keys, lengths = attention_mask[:, 0, 0]
        keys, values = (states.transpose(1, 2).flatten(0, 1) for states in (key, value))  # (B C, Hkv, D)
        output = torch.ops.aten._flash_attention_forward(
            *(query[:, :, 0], keys, values, begin, begin_keys, 1, key.shape[2], 0.0, False, False),
            scale=scaling,
            seqused_k=lengths[:rows],
        )[0]  # (B, Hq, D)
    return output.reshape(rows, 1, heads, -1), None


AttentionInterface.register(STATIC, static_attention)
