"""Adding up what tensors would allocate and free, in a forward and its backward."""

import gc
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """Adds up the storage of every tensor that comes into being in the block, and takes it off when it is freed."""

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: its weights, buffers and gradients are there already, and are not counted.
        """
        super().__init__()
        self.live = self.peak = 0  # bytes
        held = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        self.known = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return False  # no mask is all true: the case that takes more
        if func is torch.ops.aten.index.Tensor and getattr(args[1][0], "dtype", None) == torch.bool:
            # Rows that a mask picks: all of them, as in a batch of the longest rows.
            result = args[0].flatten(0, args[1][0].ndim - 1).clone()
        else:
            result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: Any) -> None:
        """Count a storage that is new, until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            weakref.finalize(storage, self.free, key, size).atexit = False
            self.live += size
            self.peak = max(self.peak, self.live)

    def free(self, key: int, size: int) -> None:
        """Take off a storage that is freed."""
        self.known.discard(key)
        self.live -= size

    def restart(self) -> int:
        """The peak since the last call, in bytes. The next one is measured from what is there now."""
        peak, self.peak = self.peak, self.live
        return peak


class MicroBatchMemory(NamedTuple):
    """What a micro-batch takes, in bytes, above what is there before it."""

    saved: float  # held from the forward when the final hidden states are there
    activations: float  # peak of the backbone's forward and backward
    logits: float  # what the head takes above `saved`, in its forward and backward

    @property
    def peak(self) -> float:
        """The most that is there at one time."""
        return max(self.activations, self.saved + self.logits)


def meter_micro_batch(model: nn.Module, backbone: nn.Module, step: Callable[[], Any]) -> MicroBatchMemory:
    """Meter a dry step, forward and maybe backward, with the gradients of earlier micro-batches there.

    The head's part lies between the backbone's output and the gradient of it.
    """
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    meter, saved, peaks = Meter(model), [0], {"backbone": 0, "head": 0}

    def ends(part: str) -> None:
        peaks[part] = max(peaks[part], meter.restart())

    def forward_ends(module: Any, args: Any, output: Any) -> None:
        ends("backbone")
        saved[0] = meter.live
        if output[0].requires_grad:
            output[0].register_hook(lambda grad: ends("head"))

    hook = backbone.register_forward_hook(forward_ends)
    gc.disable()  # a collection would hide what is freed too late
    try:
        with meter:
            step()
        ends("backbone" if peaks["head"] else "head")
    finally:
        gc.enable()
        hook.remove()
        for parameter in model.parameters():
            parameter.grad = None
    return MicroBatchMemory(saved[0], peaks["backbone"], max(0, peaks["head"] - saved[0]))
