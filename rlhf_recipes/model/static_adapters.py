"""A role's adapter for decoding: copies at fixed addresses, with one product for what layers have in common.

n rows; r the rank of an adapter whose product with its input is A and with that B.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


class StaticAdapters:
    """Copies of a role's adapter at fixed addresses, in the base's dtype and with the scale in B.

    Autocast would cast the weights anew within each graph, into memory that is freed when it ends.
    """

    def __init__(self, model: Any) -> None:
        """Args: model: a SharedBase, in evaluation mode."""
        self.model = model
        self.siblings = [Siblings(layers, model.causal.dtype) for layers in model.siblings]

    @property
    def weights(self) -> list[tuple[Any, Tensor, Tensor]]:
        """Each layer with its copies, A (r, in) and B (out, r), r its largest rank."""
        return [weights for siblings in self.siblings for weights in siblings.weights]

    @torch.no_grad()
    def refresh(self, role: str) -> None:
        """Take a role's weights as they are now."""
        copies, sources = [], []
        with self.model.role(role):
            for layer, a, b in self.weights:
                name = next(iter(layer._active_adapter), None)
                if name not in layer.lora_A:
                    b.zero_()
                    continue
                rank = layer.lora_A[name].weight.shape[0]
                b[:, rank:].zero_()
                copies += [a[:rank], b[:, :rank]]
                sources += [layer.lora_A[name].weight, layer.lora_B[name].weight * layer.scaling[name]]
        if copies:
            torch._foreach_copy_(copies, sources)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The layers compute with the copies."""
        before = [(layer, layer.forward) for layer, _, _ in self.weights]
        try:
            for siblings in self.siblings:
                for number, layer in enumerate(siblings.layers):
                    layer.forward = functools.partial(siblings.forward, number)
            yield
        finally:
            for layer, forward in before:
                layer.forward = forward


class Siblings:
    """Linear layers with adapters that are given the same input, as q, k and v are, or gate and up: or just one.

    The first of them makes for all what they have in common: the product with A and, where the base's weights are not
    quantized, that with B, which is block-diagonal and is added to the layers' outputs, side by side in one tensor.
    """

    def __init__(self, layers: list[Any], dtype: torch.dtype) -> None:
        self.layers = layers
        self.input: Tensor | None = None  # what `common` was made of
        self.common = torch.empty(0)
        self.plain = len(layers) > 1 and all(type(layer.get_base_layer()) is nn.Linear for layer in layers)
        first = [[part.weight for part in layer.lora_A.values()] for layer in layers]
        second = [next(iter(layer.lora_B.values())).weight for layer in layers]
        self.ranks = _side_by_side([max(len(a) for a in each) for each in first])
        self.outs = _side_by_side([len(b) for b in second])
        total_rank, total_out = self.ranks[-1].stop, self.outs[-1].stop
        self.a = first[0][0].new_zeros(total_rank, first[0][0].shape[1], dtype=dtype)
        zeros = functools.partial(second[0].new_zeros, dtype=dtype)
        # A product with one block at a time takes no zeros, which would be memory for nothing.
        self.b = zeros(total_out, total_rank if self.plain else max(ranks.stop - ranks.start for ranks in self.ranks))
        self.weights = [
            (layer, self.a[ranks], self.b[outs, ranks if self.plain else slice(ranks.stop - ranks.start)])
            for layer, ranks, outs in zip(layers, self.ranks, self.outs, strict=True)
        ]

    def forward(self, number: int, x: Tensor) -> Tensor:
        """What the layer of that number makes of its input: (..., in) to (..., out)."""
        layer, _, b = self.weights[number]
        if number == 0 or x is not self.input:
            self.input, self.common = x, self.make(x.flatten(0, -2).to(self.a.dtype))
        common = self.common
        if number == len(self.layers) - 1:
            self.input, self.common = None, torch.empty(0)
        if self.plain:
            result = common[:, self.outs[number]]
        else:
            result = layer.base_layer(x.flatten(0, -2).to(self.a.dtype)).addmm_(common[:, self.ranks[number]], b.T)
        return result.unflatten(0, x.shape[:-1])

    def make(self, rows: Tensor) -> Tensor:
        """Of rows (n, in) all layers' outputs (n, out) or, of a quantized base, their products with A (n, r)."""
        low = nn.functional.linear(rows, self.a)  # (n, r of all)
        if not self.plain:
            return low
        outputs = rows.new_empty(len(rows), len(self.b))
        for layer, outs in zip(self.layers, self.outs, strict=True):
            base = layer.get_base_layer()
            if base.bias is None:
                torch.mm(rows, base.weight.T, out=outputs[:, outs])
            else:
                torch.addmm(base.bias, rows, base.weight.T, out=outputs[:, outs])
        return outputs.addmm_(low, self.b.T)


def _side_by_side(sizes: list[int]) -> list[slice]:
    """Where each begins and ends."""
    ends = list(accumulate(sizes))
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


@torch.no_grad()
def sibling_layers(model: Any) -> list[list[Any]]:
    """A shared base's layers with adapters, those of one module together that a forward gives the same tensor."""
    groups: dict[Any, list[Any]] = {}
    inputs, seen = [], set()

    def note(parent: str, layer: Any, given: tuple[Any, ...]) -> None:
        if layer not in seen and given:
            seen.add(layer)
            inputs.append(given[0])  # kept, so that no other tensor gets its id
            groups.setdefault((parent, id(given[0])), []).append(layer)

    layers = {
        layer: name.rpartition(".")[0]
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and isinstance(layer.forward, functools.partial)
    }
    hooks = [layer.register_forward_pre_hook(functools.partial(note, parent)) for layer, parent in layers.items()]
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    try:
        model.states(token, torch.ones_like(token))
    finally:
        for hook in hooks:
            hook.remove()
    return [*groups.values(), *([layer] for layer in layers if layer not in seen)]
