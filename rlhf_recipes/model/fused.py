"""Norms and rotary embeddings in fewer kernels than architectures write them out in.

Not by the names of architectures: what one computes is compared on random numbers with what is to take its place.
B rows, L tokens, H heads, D the size of a head.
"""

import functools
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ROTARY = "apply_rotary_pos_emb"  # transformers' name for the function, in each architecture's own file


class Fused:
    """The norms and the rotary embeddings of a model that have shorter forms, for no gradients."""

    def __init__(self, decoder: Any) -> None:
        """Args: decoder: the text decoder."""
        self.norms: list[tuple[Any, Any]] = []
        forms: dict[Any, bool] = {}  # by what decides whether the short form is right
        for norm in decoder.modules():
            weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
            if not type(norm).__name__.endswith("RMSNorm") or weight is None or eps is None:
                continue
            short = functools.partial(rms_norm, weight, eps)
            form = type(norm), eps, weight.shape, weight.dtype
            if form not in forms:
                forms[form] = _takes(norm.forward, 1) and _same(norm, short, _states(weight, decoder.dtype))
            if forms[form]:
                self.norms.append((norm, short))
        files = {sys.modules[type(module).__module__] for module in decoder.modules()}
        self.files = [file for file in files if hasattr(file, ROTARY) and self._is_rotary(getattr(file, ROTARY))]

    @staticmethod
    @torch.no_grad()
    def _is_rotary(function: Any) -> bool:
        q, k = torch.randn(1, 4, 2, 16), torch.randn(1, 2, 2, 16)
        cos, sin = torch.randn(2, 1, 2, 16)
        return _takes(function, 4) and all(map(_close, function(q, k, cos, sin), Rotary(function)(q, k, cos, sin)))

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The model computes by the short forms."""
        functions = [(file, getattr(file, ROTARY)) for file in self.files]
        try:
            for norm, short in self.norms:
                norm.forward = short
            for file, function in functions:
                setattr(file, ROTARY, Rotary(function))
            yield
        finally:
            for file, function in functions:
                setattr(file, ROTARY, function)
            for norm, _ in self.norms:
                vars(norm).pop("forward", None)


def rms_norm(weight: Tensor, eps: float, x: Tensor) -> Tensor:
    """Root mean square norm over the last dimension (https://arxiv.org/abs/1910.07467): on CUDA one kernel."""
    return nn.functional.rms_norm(x, weight.shape, weight, eps)


class Rotary:
    """Rotary embedding of queries and keys at once, with the signs of the rotation in the sines.

    Source: https://arxiv.org/abs/2104.09864, with the halves of a head as pairs.
    """

    def __init__(self, function: Any) -> None:
        """Args: function: what is called where a call asks for more, or for a rotation of a part of each head."""
        self.function = function
        self.sin: Tensor | None = None  # that of all layers in a step, as a rule
        self.signed = torch.empty(0)

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Queries (B, H, L, D), keys and cosines and sines (B, L, D) to rotated queries and keys."""
        if args or kwargs or cos.shape[-1] != q.shape[-1] or cos.dtype != q.dtype:
            return self.function(q, k, cos, sin, *args, **kwargs)
        half = q.shape[-1] // 2
        if sin is not self.sin:
            self.sin, self.signed = sin, torch.cat([-sin[..., :half], sin[..., half:]], -1)
        both = torch.cat([q, k], 1)
        rotated = torch.addcmul(both * cos.unsqueeze(1), both.roll(half, -1), self.signed.unsqueeze(1))
        return rotated.split([q.shape[1], k.shape[1]], 1)


def _takes(function: Any, required: int) -> bool:
    """Whether a function can be called with so many positional arguments."""
    parameters = list(inspect.signature(function).parameters.values())
    return len(parameters) >= required and all(p.default is not p.empty for p in parameters[required:])


def _states(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Random states, some of them so small that a norm's epsilon matters."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4, *weight.shape, generator=generator) * torch.tensor([1, 10, 1e-3, 1e-3])[:, None]
    return states.to(weight.device, dtype)


@torch.no_grad()
def _same(norm: Any, short: Any, x: Tensor) -> bool:
    return _close(norm(x), short(x))


def _close(found: Any, expected: Any) -> bool:
    """Whether two results are equal to rounding."""
    tolerance = 4 * torch.finfo(expected.dtype).eps
    return found.dtype == expected.dtype and torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
