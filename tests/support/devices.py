"""A second device for a machine that has one: `cpu:1`, whose tensors are the CPU's under another name.

As on cards, an operation that is given tensors of both raises, and `to` makes a copy. Weights there keep their dtype.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

FIRST, SECOND = torch.device("cpu"), torch.device("cpu", 1)
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class OnSecond(Tensor):
    """A tensor that says of itself that it is on the second device, around the one that it is."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnSecond":
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=SECOND
        )

    def __init__(self, inner: Tensor) -> None:
        self.held = inner

    def __repr__(self, **kwargs: Any) -> str:
        return f"OnSecond({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class TwoDevices(TorchDispatchMode):
    """Within it `device="cpu:1"` and `.to("cpu:1")` give tensors on the second device; they count in `moved`."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0  # tensors from one device to the other

    def __enter__(self) -> "TwoDevices":
        # Else a module's `to` puts the new tensor into the old one, of which its name alone would change.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.moved += func is MOVES[0] and (kwargs or {}).get("device", args[0].device) != args[0].device
        return dispatch(func, args, kwargs or {})


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute an operation of tensors that are all on one device, or move one."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    # A number may be anywhere. `torch.tensor` makes none on the second device; the empty one of a cache is harmless.
    places = {tensor.device for tensor in tensors if tensor.ndim and tensor.numel()}
    if func not in MOVES and len(places) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} was given {places}.")
    asked = kwargs.get("device")
    second = SECOND in places if asked is None else asked == SECOND
    inner_args, inner_kwargs = tree_map_only(OnSecond, lambda tensor: tensor.held, (args, kwargs))
    if asked == SECOND:
        inner_kwargs["device"] = FIRST
    output = func(*inner_args, **inner_kwargs)
    if func._schema.is_mutable and not isinstance(output, tuple | list):
        return None if output is None else kwargs.get("out", args[0])
    return tree_map_only(Tensor, OnSecond, output) if second else output
