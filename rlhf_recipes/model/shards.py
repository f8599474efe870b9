"""A base in shards: each process keeps a part of every decoder layer, and gathers a layer's weights when it uses them.

The base is frozen, so there are no gradients to scatter, and a layer's weights are bytes that come and go, in 4 and 8
bits as in 16. All layers' weights are views of one room, in which one layer stands at a time: whoever uses another one
gathers it over the first. A backward brings a layer back when the gradient of its output is there.

Processes use layers in different numbers and orders: one still decodes when another has finished, the main one alone
measures a reward model. So before a layer is gathered each process says which one it wants, and one that waits for the
others says that it wants none, and helps to gather until all wait. torch's `fully_shard` (FSDP) has no such word: with
it all processes must run equally many forwards. It would also replace the parameters in which bitsandbytes keeps what
it needs to read 4 bits.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakValueDictionary

import torch
from bitsandbytes.nn import Int8Params
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..recipe.values import Base
from .processes import count, gather_tensors, in_turn, rank, while_waiting
from .split import decoder_layers

ALIGNMENT = 16  # bytes, at which every tensor of a layer begins
WAITS = (-1, -1)  # the wish of a process that wants no layer

_bases: WeakValueDictionary[int, "Shards"] = WeakValueDictionary()  # those that are there, as they were made
_numbers = itertools.count()


def is_sharded(base: Base) -> bool:
    """Whether a base is to be loaded in shards. In one process a recipe that says so loads as if it said `layers`."""
    return base.split == "shards" and count() > 1


def load_in_shards(load: Callable[[], PreTrainedModel], device: torch.device) -> PreTrainedModel:
    """A model on a device, of its decoder layers this process's part alone.

    Args:
        load: loads it whole, on the CPU. One process after another does, so that the machine holds it once.
    """

    def load_part() -> PreTrainedModel:
        model: Any = load().requires_grad_(False)
        model.shards, model.hf_device_map = Shards(model, device), {"": device}
        return model

    model = in_turn(load_part)
    while_waiting(wait)
    return model


class Shards:
    """This process's part of each layer of a base, and the room in which whole layers stand."""

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        """
        Args:
            model: whole, and not used yet. The frozen tensors of its layers become views of the room.
            device: where the parts and the room are to be, and all else of the model is brought.
        """
        layers = [*decoder_layers(model).values()]
        for quantized in (p.quant_state for p in model.parameters() if hasattr(p, "quant_state")):
            quantized.to(device)  # what is small of it stays whole
        sizes = [sum(aligned(tensor.nbytes) for tensor in tensors_of(layer)) for layer in layers]
        unit = ALIGNMENT * count()
        self.parts = [torch.empty(-(-size // unit) * ALIGNMENT, dtype=torch.uint8, device=device) for size in sizes]
        self.room = torch.empty(max(map(len, self.parts)) * count(), dtype=torch.uint8, device=device)
        self.spare = torch.empty_like(self.room)  # for layers that only others want
        self.inside: int | None = None  # the layer that stands in the room
        for number, layer in enumerate(layers):
            self.take(layer, self.parts[number])
            layer.register_forward_pre_hook(functools.partial(self.before_forward, number))
            layer.register_forward_hook(functools.partial(self.behind_forward, number))
        nn.Module.to(model, device)
        self.key = next(_numbers)
        _bases[self.key] = self

    def take(self, layer: nn.Module, part: Tensor) -> None:
        """Fill this process's part of a layer, and let the layer's tensors be views of the room."""
        whole, start = torch.zeros(len(part) * count(), dtype=torch.uint8), 0
        for tensor in tensors_of(layer):
            place = slice(start, start + tensor.nbytes)
            whole[place] = tensor.detach().contiguous().view(-1).view(torch.uint8)
            tensor.data = self.room[place].view(tensor.dtype).view(tensor.shape)
            if isinstance(tensor, Int8Params):  # which holds itself once more, and the scales of its rows
                tensor.CB, tensor.SCB = tensor.data, tensor.SCB.to(self.room.device)
            start += aligned(tensor.nbytes)
        part.copy_(whole.chunk(count())[rank()])

    def bring(self, number: int) -> None:
        """Gather a layer into the room, where it does not stand there already."""
        if self.inside != number:
            self.inside = None
            answer((self.key, number))
            self.inside = number

    def before_forward(self, number: int, module: nn.Module, inputs: Any) -> None:
        """A hook."""
        self.bring(number)

    def behind_forward(self, number: int, module: nn.Module, inputs: Any, output: Any) -> None:
        """A hook: a layer's backward, too, finds it in the room. It begins when the hidden states have a gradient."""
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: self.bring(number))


def tensors_of(layer: nn.Module) -> Iterator[Tensor]:
    """What is frozen in a layer: its weights, and of 4 bits the scale of each block (and the scales of those)."""
    for parameter in layer.parameters():
        yield parameter
        scales = getattr(parameter, "quant_state", None)
        while scales is not None:
            yield scales.absmax
            scales = scales.state2


def aligned(size: int) -> int:
    """Bytes that a tensor takes with what is left empty behind it."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def answer(wish: tuple[int, int]) -> bool:
    """Say which layer of which base this process wants, and help to gather what any of them wants.

    Returns whether any wanted one.
    """
    wishes = gather_tensors(torch.tensor(wish))  # (processes * 2,)
    wanted = sorted({(key, number) for key, number in wishes.view(-1, 2).tolist()} - {WAITS})
    for key, number in wanted:
        base = _bases[key]
        part = base.parts[number]
        place = base.room if (key, number) == wish else base.spare
        gather_tensors(part, place[: len(part) * (len(wishes) // 2)])
    return bool(wanted)


def wait() -> None:
    """Help to gather until all processes wait."""
    while answer(WAITS):
        pass
