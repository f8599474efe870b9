"""The processes of a run: each has the whole model, works on its share of the rows, and learns what the others found.

torchrun starts them, and `join` makes them a group. transformers, TRL and accelerate are not told: each process sees a
run of one, whose batches, order of rows, random numbers and checkpoints are those of the whole. What is shared is
added up here: a tensor that holds zeros for the rows of the others, or gradients of a share of the loss. With one
process every function is an identity.
"""

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors.error_handler import ErrorHandler

T = TypeVar("T")

PATIENCE = 60  # seconds in which the launcher ends a process whose group has lost another

_alone = False  # within `on_main`
_summed = 0  # bytes since `take_summed`
_help: Callable[[], None] | None = None  # see `while_waiting`


def count() -> int:
    """The number of processes that share the work."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def rank() -> int:
    """This process's number among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process writes and speaks for all."""
    return rank() == 0


@functools.cache
def visible_gpus() -> list[str]:
    """What CUDA calls the GPUs that this process could see when it began, before `join` has chosen one of them."""
    gpus = torch.cuda.device_count()
    return (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))).split(",") if gpus else []


def join(split: bool = False) -> None:
    """Become one of the processes that torchrun has started; where it has started none, the only one.

    To be called before a trainer's configuration is made and before CUDA is used. The process sees its own GPU alone.
    Only the main one is heard: a terminal has one bar.

    Args:
        split: the base is to lie on several GPUs, and the only process sees all of them.
    Raises:
        ValueError: there are more processes than GPUs.
    """
    if dist.is_initialized():
        return
    gpus, here = len(visible_gpus()), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if gpus and not (split and here == 1):
        if here > gpus:
            raise ValueError(f"{here} processes want a GPU each, and {gpus} can be seen: start {gpus}.")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus()[int(os.environ.get("LOCAL_RANK", 0))]
        if gpus > here == 1:
            ways = f"--processes {gpus} uses all, and --jobs {gpus} those of a sweep"
            print(f"{gpus} GPUs can be seen, and one is used: {ways}.", file=sys.stderr)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    # One may write, sample or wait for labels alone for long; a process that dies is the launcher's to notice.
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(days=7))
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):  # by which accelerate would know of the others
        del os.environ[name]
    Thread(target=_end_with_launcher, args=[os.getppid()], daemon=True).start()
    if not is_main():
        silence = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(silence, stream.fileno())


def _end_with_launcher(launcher: int) -> None:
    """End this process when the launcher is gone: it must not write in a folder that is resumed."""
    while os.getppid() == launcher:
        time.sleep(1)
    os._exit(1)


@contextmanager
def reported() -> Iterator[None]:
    """A block whose error goes to the launcher, which ends the other processes and says it once."""
    try:
        yield
    except Exception as error:
        if "TORCHELASTIC_ERROR_FILE" not in os.environ:
            raise
        ErrorHandler().record_exception(error)
        sys.stdout.flush()
        os._exit(1)  # the interpreter's own end may wait for the others


@contextmanager
def _patient() -> Iterator[None]:
    """A block that waits for the others. Where one of them has died, the launcher says which, and ends this one."""
    try:
        yield
    except RuntimeError:
        time.sleep(PATIENCE)
        raise


@contextmanager
def _together() -> Iterator[None]:
    """A block that all processes go through, each after it has helped those that are not there yet."""
    if _help is not None:
        _help()
    with _patient():
        yield


def while_waiting(help_others: Callable[[], None]) -> None:
    """From now on call this before each wait for the other processes, which all do the same."""
    global _help
    _help = help_others


def gather_tensors(own: Tensor, place: Tensor | None = None) -> Tensor:
    """The tensors of all processes, of one length, one behind another: in `place`, or in a new one.

    It asks nobody for help, and goes to all processes within `on_main` too.
    """
    place = own.new_empty(dist.get_world_size() * len(own)) if place is None else place
    # torch 2.13 has renamed it.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    with _patient():
        gather(place, own)
    return place


def all_sum_(tensors: Sequence[Tensor]) -> None:
    """Add to tensors of one dtype those of the other processes, in one message."""
    if count() == 1 or not tensors:
        return
    global _summed
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    _summed += flat.nbytes
    with _together():
        dist.all_reduce(flat)
    for tensor, whole in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(whole.view_as(tensor))


def take_summed() -> int:
    """The bytes of what `all_sum_` has added up since it was asked last. A ring sends twice that, less a share."""
    global _summed
    summed, _summed = _summed, 0
    return summed


def all_gather(value: T) -> list[T]:
    """What each process has, in their order."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    with _together():
        dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """What the main process has."""
    if count() == 1:
        return value
    values = [value if is_main() else None]
    with _together():
        dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]  # type: ignore[return-value]


def on_main(work: Callable[[], T]) -> T:
    """Let the main process do work, by itself, while the others wait. Returns what it returned, on all of them."""
    global _alone
    if count() == 1:
        return work()
    result: Any = None
    if is_main():
        _alone = True
        try:
            result = work()
        finally:
            _alone = False
    return broadcast(result)


def in_turn(work: Callable[[], T]) -> T:
    """Let the processes do work one after another. Returns what this one's returned."""
    result: Any = None
    for turn in range(count()):
        if turn == rank():
            result = work()
        broadcast(None)
    return result


def same_random_numbers() -> None:
    """Let all processes draw the numbers that the main one draws, whatever a user's function has drawn."""
    if count() > 1:
        torch.set_rng_state(broadcast(torch.get_rng_state()))


def share(rows: int) -> slice:
    """Which of so many rows are this process's: a part in one piece."""
    return slice(rows * rank() // count(), rows * (rank() + 1) // count()) if count() > 1 else slice(0, rows)


def gather_rows(rows: Sequence[Tensor], total: int, width: int, device: torch.device) -> list[Tensor]:
    """All `total` rows of integers, from the `share` that each process has; those of several are `width` long."""
    if count() == 1:
        return list(rows)
    whole = torch.zeros(total, width, dtype=torch.long, device=device)
    for row, of_whole in zip(rows, whole[share(total)], strict=True):
        of_whole[: len(row)] = row
    all_sum_([whole])
    return list(whole)
