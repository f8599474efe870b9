"""Products with weights in 4 bits: which of bitsandbytes' two ways is the faster one on this card, measured.

One kernel multiplies by the packed weight; or three unpack it into 16 bits, and a plain product follows. bitsandbytes
chooses by a table for each kind of card. The two differ in rounding only.

M rows, N outputs, K inputs of a product.
"""

import functools
import inspect
import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# bitsandbytes' private name for the function that says whether the one kernel is to be taken, and its arguments.
CHOICE = "_gemm_4bit_use_custom_fn"
ARGUMENTS = ["device_index", "dtype", "M", "N", "K"]
GAIN = 0.95  # the other way must take no more than this share of the time, or bitsandbytes' table stands

Product = tuple[torch.dtype, int, int, int]  # of its inputs; M, N, K
Time = Callable[[Sequence[Callable[[], Tensor]]], float]  # of calls one after the other, in seconds


class Products:
    """What was measured, and bitsandbytes' table for everything else."""

    def __init__(self, backend: Any) -> None:
        """
        Args:
            backend: bitsandbytes' CUDA backend, or None where there is none.
        """
        self.backend = backend
        self.fused: dict[Product, bool] = {}  # whether the one kernel is taken
        self.seconds: dict[Product, dict[bool, float]] = {}  # of a product, by whether it is
        self.table: Any = getattr(backend, CHOICE, None)
        self.is_known = self.table is not None and list(inspect.signature(self.table).parameters) == ARGUMENTS
        if backend is not None and not self.is_known:
            logger.warning("This bitsandbytes chooses products by a function that is not known: its choice stands.")

    def choice(self, device_index: int, dtype: torch.dtype, M: int, N: int, K: int) -> bool:
        """Whether the one kernel is taken: what bitsandbytes asks."""
        fused = self.fused.get((dtype, M, N, K))
        return self.table(device_index, dtype, M, N, K) if fused is None else fused

    @contextmanager
    def installed(self) -> Iterator[None]:
        """bitsandbytes takes what was measured. Only decoding does: in training a product's rounding is not to vary."""
        if not self.is_known:
            yield
            return
        before = getattr(self.backend, CHOICE)
        try:
            setattr(self.backend, CHOICE, self.choice)
            yield
        finally:
            setattr(self.backend, CHOICE, before)

    @torch.no_grad()
    def measure(self, decoder: nn.Module, rows: int, time: Time | None = None) -> None:
        """Measure both ways for so many rows, for each shape of a decoder's layers in 4 bits that is not yet known."""
        if not self.is_known:
            return
        shapes: dict[tuple[int, int], list[Linear4bit]] = defaultdict(list)
        for layer in decoder.modules():
            if isinstance(layer, Linear4bit):
                shapes[layer.out_features, layer.in_features].append(layer)
        for (outputs, inputs), layers in shapes.items():
            device, dtype = layers[0].weight.device, layers[0].compute_dtype
            assert dtype is not None
            product = dtype, rows, outputs, inputs
            if product in self.fused:
                continue
            x = torch.linspace(-1, 1, rows * inputs, device=device, dtype=dtype).view(rows, inputs)
            # All layers of a shape: a weight that was just read would come from the card's cache.
            calls = [functools.partial(layer, x) for layer in layers]
            usual = self.table(device.index, *product)
            took = {fused: self._took(product, fused, calls, time or replayed) for fused in (usual, not usual)}
            fused = usual if took[not usual] > GAIN * took[usual] else not usual
            self.seconds[product], self.fused[product] = took, fused
            names = "unpacked first", "one kernel"
            logger.info(
                "4-bit products of %d rows, %d to %d: %s, %.1f µs and not %.1f. By bitsandbytes' table: %s.",
                *(rows, inputs, outputs, names[fused], 1e6 * took[fused], 1e6 * took[not fused], names[usual]),
            )

    def _took(self, product: Product, fused: bool, calls: Sequence[Callable[[], Tensor]], time: Time) -> float:
        self.fused[product] = fused
        try:
            with self.installed():
                return time(calls) / len(calls)
        finally:
            del self.fused[product]


def replayed(calls: Sequence[Callable[[], Tensor]]) -> float:
    """Seconds of calls one after the other in a CUDA graph, as they are in a step of decoding: the least of five."""
    calls[0]()  # what libraries load with the first
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for call in calls:
            call()
    seconds = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000)
    graph.reset()
    return min(seconds)


@functools.cache
def products() -> Products:
    """What this process has measured. bitsandbytes has loaded its backend for CUDA where there is a device."""
    return Products(sys.modules.get("bitsandbytes.backends.cuda.ops"))
