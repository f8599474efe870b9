"""Attention of our own, registered by name with transformers' AttentionInterface.

Over a cache of fixed size a model attends by it while `attends_by` has put its name into the configuration; over packed
rows, those of a batch one behind the other in one row, it stands where PyTorch's attention is, which it else calls.

B rows, N tokens of all rows, C tokens that a cache has room for, Hq query heads, Hkv heads of keys and values, D the
size of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

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


def static_mask(lengths: Tensor, capacity: int, dtype: torch.dtype | None) -> Tensor:
    """What `static_attention` takes in the place of a mask: how many keys each row's query sees.

    It has four dimensions, because transformers hands such a mask to the layers as it is.

    Args:
        lengths: (B,) int32, 1 or more.
        dtype: of queries and keys, or None where FlashAttention is to be called.
    Returns:
        (B, 1, 1, C), 0 or minus infinity, which is what torch would make of a bool in each layer; for FlashAttention
        (3, 1, 1, B + 1) int32: where each row's queries and its keys begin, and the lengths.
    """
    if dtype is not None:
        hidden = torch.arange(capacity, device=lengths.device) >= lengths[:, None]  # (B, C)
        return hidden.to(dtype).masked_fill_(hidden, -torch.inf)[:, None, None]
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
    if attention_mask.is_floating_point():
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


def packing(lengths: Tensor, longest: int, ours: bool) -> dict[str, Any]:
    """What a decoder's forward is given beside the ids and positions (1, N) of packed rows.

    Args:
        lengths: (B,) tokens of each row.
        longest: the largest of them.
        ours: whether `attention` below is the decoder's, and not a FlashAttention of transformers.
    """
    starts = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()  # (B + 1,): where each row begins, and the last ends
    # Without a mask transformers makes one (N, N) for `sdpa`; one of four dimensions goes to the layers as it is.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=lengths.device) if ours else None
    ends = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
    return {"attention_mask": mask, **ends}


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention `sdpa`, and where it is given a `packing` causal attention within each packed row.

    Args:
        query, key, value: (B, heads, L, D), of packed rows (1, heads, N, D).
    Returns:
        (B, L, heads, D), and no weights.
    Raises:
        ValueError: the architecture caps the products of packed rows, or adds to them.
    """
    starts = kwargs.get("cu_seq_lens_q")
    if starts is None or attention_mask is None or attention_mask.numel() != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    asked = [name for name in BEYOND if kwargs.get(name) is not None]
    if asked:
        raise ValueError(f"attention over packed rows has no {asked[0]}")
    return packed_attention(query, key, value, starts, kwargs["max_length_q"], kwargs.get("scaling")), None


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scaling: float | None
) -> Tensor:
    """Causal attention within each packed row: (1, heads, N, D) to (1, N, heads, D).

    On a GPU it is one kernel for all rows (FlashAttention, arXiv:2307.08691, for 16 bits), elsewhere a call for each.

    Args:
        starts: (B + 1,) int32, where each row begins, and the last ends.
        longest: the tokens of the longest row.
        scaling: of the products of queries and keys; None: 1 / sqrt(D).
    """
    if query.device.type != "cpu":
        # The operator of torch.nn.attention.varlen, whose arguments are others in each version of PyTorch.
        tokens = [states[0].transpose(0, 1) for states in (query, key, value)]  # (N, heads, D) each
        flash = torch.ops.aten._flash_attention_forward
        return flash(*tokens, starts, starts, longest, longest, 0.0, True, False, scale=scaling)[0][None]
    lengths = starts.diff().tolist()
    grouped = query.shape[1] != key.shape[1]
    rows = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    outputs = [
        nn.functional.scaled_dot_product_attention(*row, is_causal=True, scale=scaling, enable_gqa=grouped)
        for row in rows
    ]  # (1, heads, l, D) each
    return torch.cat([output.transpose(1, 2) for output in outputs], 1)


AttentionInterface.register(STATIC, static_attention)
AttentionInterface.register("sdpa", attention)
