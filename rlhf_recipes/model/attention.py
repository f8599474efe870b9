"""PyTorch's attention as transformers has it, and over packed rows: those of a batch one behind the other in one row.

B rows, N tokens of all rows, D the size of a head.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


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
    asked = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
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


AttentionInterface.register("sdpa", attention)
