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
from torch.func import functional_call

ROTARY = "apply_rotary_pos_emb"  # transformers' name for the function, in each architecture's own file


class Fused:
    """The norms and the rotary embeddings of a model that have shorter forms, for no gradients."""

    def __init__(self, decoder: Any) -> None:
        """Args: decoder: the text decoder."""
        self.norms: list[tuple[Any, Any]] = []
        right: dict[Any, bool] = {}  # whether the short form is, by what that depends on
        for norm in decoder.modules():
            weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
            if type(norm).__name__.endswith("RMSNorm") and isinstance(weight, nn.Parameter) and eps is not None:
                form = type(norm), eps, weight.shape, weight.dtype
                if form not in right:
                    right[form] = is_rms_norm(norm, eps, decoder.dtype)
                if right[form]:
                    self.norms.append((norm, functools.partial(rms_norm, weight, eps)))
        files = {sys.modules[type(module).__module__] for module in decoder.modules()}
        self.files = [file for file in files if hasattr(file, ROTARY) and is_rotary(getattr(file, ROTARY))]

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


@torch.no_grad()
def is_rms_norm(norm: Any, eps: float, dtype: torch.dtype) -> bool:
    """Whether a module computes `rms_norm` with its weight, whatever that is, and without further arguments."""
    if len(inspect.signature(norm.forward).parameters) != 1:
        return False
    device, random = norm.weight.device, torch.Generator().manual_seed(0)
    weight = torch.randn(norm.weight.shape, generator=random).to(norm.weight)
    sizes = torch.tensor([1, 10, 1e-3, 1e-3])[:, None]  # some so small that the epsilon matters
    states = (torch.randn(4, len(weight), generator=random) * sizes).to(device, dtype)
    return _equal(functional_call(norm, {"weight": weight}, states), rms_norm(weight, eps, states))


@torch.no_grad()
def is_rotary(function: Any) -> bool:
    """Whether a function computes what `Rotary` does."""
    if list(inspect.signature(function).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    random = torch.Generator().manual_seed(0)
    q, k, cos, sin = (torch.randn(*shape, 2, 16, generator=random) for shape in ((1, 4), (1, 2), (1,), (1,)))
    try:
        found = function(q, k, cos, sin)
    except (RuntimeError, TypeError):  # one that takes cosines of another size, or needs more
        return False
    return all(map(_equal, found, Rotary(function)(q, k, cos, sin)))


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


def _equal(found: Tensor, expected: Tensor) -> bool:
    """Whether two results are the same to rounding."""
    tolerance = 4 * torch.finfo(expected.dtype).eps
    return found.dtype == expected.dtype and torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
