"""A base over several cards, in one process: its decoder layers lie on them one behind another, all else on the first.

accelerate's hooks bring what a layer is given to its card. What the last layer gives is on the first card again, where
ids, embeddings, heads, logits and losses are: nothing else in this package knows of the others. An adapter lies where
its layer does, and so do a layer's keys and values.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module, remove_hook_from_submodules
from accelerate.utils import send_to_device
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..recipe.values import Base
from .architecture import text_decoder
from .processes import count

# Bytes of a weight of a quantized linear layer: NF4 with its constants (QLoRA, arXiv:2305.14314, section 3), and int8.
QUANTIZED = {"nf4": 0.516, "int8": 1.0}


def cards() -> list[torch.device]:
    """What a base can be laid over: the GPUs that this process sees, or the CPU."""
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())] or [torch.device("cpu")]


def is_split(base: Base) -> bool:
    """Whether a base is to lie on several cards. With a single one a recipe that says so loads as any other.

    One that was trained in shards is laid over the cards by the commands that are one process.
    """
    return base.split is not None and count() == 1 and len(cards()) > 1


def lies_on_several(model: Any) -> bool:
    """Whether a model, or a shared base, does lie on several: one of a single layer does not."""
    return len({*getattr(model, "hf_device_map", {}).values()}) > 1


def check_split(base: Base) -> None:
    """Raises ValueError where a recipe's base is to be split, and cannot be here."""
    if base.split is None:
        return
    if base.split == "shards":
        if count() == 1:
            raise ValueError(
                "base.split=shards shares the base's layers among processes, and this is the only one: add --processes "
                "and their number, or set base.split=layers."
            )
        return
    if count() > 1:
        raise ValueError(
            f"base.split={base.split} lays one base over the GPUs of one process, and there are {count()} processes: "
            "leave out one of the two."
        )
    if len(cards()) < 2:
        seen = f"{torch.cuda.device_count()} can be seen"
        raise ValueError(f"base.split={base.split} lays the base over two GPUs or more, and {seen}: leave it out.")


def decoder_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers of a model's text decoder by their names, in their order."""
    inside = set(text_decoder(model).modules())
    return {n: m for n, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer) and m in inside}


def layer_map(model: PreTrainedModel, quantization: str | None, dtype: torch.dtype) -> dict[str, torch.device]:
    """Where each part of a model lies, as accelerate's device maps say it.

    What is outside the layers is on the first card (see `deal`).

    Args:
        model: on the meta device, unquantized.
        quantization, dtype: what its linear layers, and all else, will be held in.
    Raises:
        ValueError: no decoder layers are found in it.
    """
    devices, layers = cards(), decoder_layers(model)
    if not layers:
        raise ValueError(f"base.split: in a {type(model).__name__} no decoder layers are found to lay over cards.")
    prefixes = tuple(f"{name}." for name in layers)
    outside = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(prefixes)) * dtype.itemsize
    sizes = [layer_bytes(layer, quantization, dtype) for layer in layers.values()]
    places = {name: devices[card] for name, card in zip(layers, deal(sizes, outside, len(devices)), strict=True)}
    holders = {name[:at] for name in layers for at in (0, *(i for i, c in enumerate(name) if c == "."))}
    tensors = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    rest = [n for n in (*dict(model.named_modules()), *tensors) if n not in holders and n.rpartition(".")[0] in holders]
    return dict.fromkeys(rest, devices[0]) | places


def deal(sizes: Sequence[float], outside: float, count: int) -> list[int]:
    """The number of the card on which each layer lies, so that each of them has as many bytes as whole layers allow.

    Of the layers' bytes in one row, the first part makes up the first card's share, the others are equal, and a layer
    is on the card in whose part its middle lies. The first layer is always on the first card (see `HandOn`).

    Args:
        sizes: of the layers, in bytes.
        outside: bytes of all else, which is on the first card.
        count: of the cards, two or more.
    """
    first = max(0.0, (outside + sum(sizes)) / count - outside)
    part = (sum(sizes) - first) / (count - 1)
    middles = [end - size / 2 for end, size in zip(itertools.accumulate(sizes), sizes, strict=True)]
    return [0, *(1 + int((middle - first) / part) if middle > first else 0 for middle in middles[1:])]


def layer_bytes(layer: nn.Module, quantization: str | None, dtype: torch.dtype) -> float:
    """Bytes of a layer's weights."""
    linear = QUANTIZED.get(quantization or "", dtype.itemsize)
    owned = ((module, p) for module in layer.modules() for p in module.parameters(recurse=False))
    return sum(p.numel() * (linear if isinstance(module, nn.Linear) else dtype.itemsize) for module, p in owned)


class HandOn(ModelHook):
    """Sends what a layer gives to the card of the next one.

    Checkpointing keeps the state of the random numbers of the card that a layer's input is on, and no other: were the
    input brought over inside the layer, the dropout of adapters would draw other zeros when its forward runs again.
    """

    def __init__(self, card: torch.device) -> None:
        self.card = card

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return send_to_device(output, self.card)


def hook_layers(model: PreTrainedModel) -> None:
    """Let each layer of a model that lies on several cards hand on to the next one, and the last to the first card.

    Of accelerate's hooks those go that would find everything in its place: the model's own, the head's, and those of a
    layer's parts.
    """
    places: dict[str, torch.device] = model.hf_device_map  # type: ignore[assignment]
    layers = decoder_layers(model)
    followers = [*(places[name] for name in [*layers][1:]), cards()[0]]
    for layer, card in zip(layers.values(), followers, strict=True):
        for part in layer.children():
            remove_hook_from_submodules(part)
        add_hook_to_module(layer, HandOn(card), append=True)
    for module in filter(None, (model, model.get_output_embeddings())):
        remove_hook_from_module(module)
