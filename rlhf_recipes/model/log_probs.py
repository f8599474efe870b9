"""Log-probabilities of tokens from hidden states, with the logits made in chunks and never kept.

N tokens, H hidden size, V vocabulary entries.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Logits that exist at one time, in elements: 64 MiB of float32. A (B, T, V) tensor would take 40 GiB at V = 152k.
LOGITS_AT_ONCE = 2**24
CPU_ROWS = 128  # and in rows on a CPU, whose cache is small
CPU_WEIGHTS = 2**22  # weights that are there in float32 at one time on a CPU, whose 16-bit products have 16-bit results


def token_log_probs(
    hidden: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    vocabulary: int,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each label and entropy of each distribution, with the logits made in chunks.

    A token's log-probability depends on its own row of `hidden` alone. So its gradient with respect to that row is
    taken at once, while the chunk's logits are there, and kept in their place: logits are neither stored nor made anew.

    Args:
        hidden: (N, H) final hidden states, each at the position before its label.
        labels: (N,) token ids.
        head: maps (n, H) to logits (n, V), row by row. It gets no gradient itself: it must be frozen.
        vocabulary: V, which sets the chunk length.
        temperature: divides the logits; the policy is the tempered distribution.
    Returns:
        log-probabilities (N,) in float32, and entropies (N,) without gradient, or None.
    """
    chunk = max(1, LOGITS_AT_ONCE // vocabulary)
    if hidden.device.type == "cpu":
        chunk = min(chunk, CPU_ROWS)
    log_probs, entropy = _TokenLogProbs.apply(hidden, labels, head, chunk, temperature, with_entropy)
    return log_probs, entropy if with_entropy else None


def chunks(count: int, size: int) -> list[slice]:
    """So many rows in chunks of one size."""
    return [slice(start, start + size) for start in range(0, count, size)]


class _TokenLogProbs(torch.autograd.Function):
    """`token_log_probs` in chunks of rows, n at a time, whose gradient is made in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        head: Callable[[Tensor], Tensor],
        chunk: int,
        temperature: float,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        trains = ctx.needs_input_grad[0]
        log_probs, entropy = torch.zeros(2, len(labels), device=hidden.device)
        gradient = torch.empty_like(hidden) if trains else None  # (N, H): of each log-probability to its hidden state
        for rows in chunks(len(labels), chunk):
            states, label = hidden[rows].detach().requires_grad_(trains), labels[rows, None]
            with torch.set_grad_enabled(trains):
                output = head(states)  # (n, V)
            logits = output.detach().float()
            if temperature != 1:
                logits = logits / temperature
            normalized = logits.log_softmax(-1)
            log_probs[rows] = normalized.gather(1, label)[:, 0]
            if with_entropy or gradient is not None:
                probs = normalized.exp()
                if with_entropy:
                    entropy[rows] = -torch.linalg.vecdot(probs, normalized)
                if gradient is not None:
                    # d log p(label) / d logits is the label's unit vector less the probabilities.
                    probs.scatter_add_(1, label, probs.new_full(label.shape, -1.0))
                    (slope,) = torch.autograd.grad(output, states, probs.to(output.dtype))
                    torch.mul(slope, -1 / temperature, out=gradient[rows])
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_log_probs[:, None].to(gradient.dtype), None, None, None, None, None


def float32_linear(layer: nn.Linear, hidden: Tensor) -> Tensor:
    """A frozen linear layer in 16 bits with a result in float32: hidden states (..., H) to logits (..., V).

    Rounding logits to 16 bits is a quarter of the noise of their log-probabilities (the head in float32: MiniMax-M1,
    arXiv:2506.13585, section 3.2).
    """
    with torch.autocast(hidden.device.type, enabled=False):
        logits = _Float32Product.apply(hidden.flatten(0, -2).to(layer.weight.dtype), layer.weight)
        if layer.bias is not None:
            logits = logits + layer.bias
    return logits.unflatten(0, hidden.shape[:-1])


class _Float32Product(torch.autograd.Function):
    """Rows (n, H) times a frozen matrix (V, H), both in 16 bits, as (n, V) in float32."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return float32_product(rows, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradient.to(weight.dtype) @ weight, None


def float32_product(rows: Tensor, weight: Tensor) -> Tensor:
    """Rows (n, H) times a matrix (V, H), both in 16 bits, as (n, V) in float32."""
    if rows.device.type == "cuda":
        return torch.mm(rows, weight.T, out_dtype=torch.float32)
    rows = rows.float()
    parts = weight.split(max(1, CPU_WEIGHTS // weight.shape[1]))
    return torch.cat([nn.functional.linear(rows, part.float()) for part in parts], 1)
