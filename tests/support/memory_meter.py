"""Exact memory on the CPU: every byte that torch's allocator gives out, the twin of torch.cuda.max_memory_allocated."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile


class Meter:
    """Bytes allocated less bytes freed since the block began: the highest so far, and what the block leaves behind."""

    peak = 0
    left = 0


@contextmanager
def measured() -> Iterator[Meter]:
    """Meter the block in this thread; the figures are there when it has ended.

    Memory that is mapped from a file (weights that safetensors reads in place) is no allocation: see `own_copy`. Each
    operation leaves a few events, so keep the block to some steps.
    """
    meter = Meter()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield meter
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        meter.left += event.nbytes()
        meter.peak = max(meter.peak, meter.left)


def own_copy(model: torch.nn.Module) -> torch.nn.Module:
    """Move weights that are mapped from a file into memory that is metered."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters and buffers, shared ones once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in (*model.parameters(), *model.buffers())}
    return sum(storage.nbytes() for storage in storages.values())
