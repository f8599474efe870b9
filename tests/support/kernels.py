"""The kernels of a piece of work, counted as a GPU would run them: operations that compute, not views."""

from collections import Counter
from contextlib import ExitStack
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh")


class Kernels:
    """Within it, `counts` are operations that compute, by name.

    torch's `rms_norm` is one, as on CUDA: on a CPU it is six. bitsandbytes' products are one each.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.paused = False

    def __enter__(self) -> "Kernels":
        self.stack = ExitStack()
        self.stack.enter_context(_Operations(self))
        self.stack.enter_context(_Functions(self))
        return self

    def __exit__(self, *exception: Any) -> None:
        self.stack.close()


class _Operations(TorchDispatchMode):
    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not (self.kernels.paused or func.is_view or name in NO_KERNEL):
            self.kernels.counts[name] += 1
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        whole = func is torch.nn.functional.rms_norm
        self.kernels.counts["rms_norm"] += whole
        self.kernels.paused |= whole
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.kernels.paused &= not whole
