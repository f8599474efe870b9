"""Peak memory, of the GPU that holds most where there is one and else of this process, and what to do without."""

import ctypes
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils.memory import release_memory, should_reduce_batch_size

logger = logging.getLogger(__name__)

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux


# The C library. Only glibc (Linux) has the two functions that are called here.
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
M_MMAP_THRESHOLD = -3  # malloc.h


def release() -> None:
    """Give free memory back: to the GPU, or from the C library's heap to the system, where it counts as taken."""
    release_memory()
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


def give_back_at_once() -> None:
    """From now on, a block of 1 MiB or more is the system's again when it is freed, and leaves no hole in the heap.

    glibc keeps blocks of up to 32 MiB. What a forward has saved lies between blocks that are freed, and the process
    holds about twice what is allocated. Without that each block's pages are new ones, which takes up to half as long
    again.
    """
    if hasattr(LIBC, "mallopt"):
        LIBC.mallopt(M_MMAP_THRESHOLD, 2**20)


def reset_peak_memory() -> None:
    """Start measuring anew."""
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(number)
    elif CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")  # sets the resident high-water mark to what is resident now


def peak_memory_mib() -> float:
    """Peak since `reset_peak_memory` in MiB: allocated on a GPU, the most of several, else resident in this process."""
    if torch.cuda.is_available():
        return max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count()))) / 2**20
    if STATUS.exists():
        return status_mib("VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes


def resident_mib() -> float:
    """Memory of this process now, in MiB; where it is not known, its peak."""
    return status_mib("VmRSS") if STATUS.exists() else peak_memory_mib()


def status_mib(field: str) -> float:
    """A size among those that Linux tells of this process (which it writes in KiB), in MiB."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 2**10


def ran_out(work: Callable[[], None]) -> bool:
    """Do the work and return False; if memory runs out, free what it took and return True. Other errors are raised."""
    try:
        work()
        return False
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
    release()  # not before the exception is gone, whose traceback holds the tensors
    return True


def halved(size: int, option: str) -> int:
    """Half of a size that was too large, which is logged. Raises torch.OutOfMemoryError where nothing can be halved."""
    if size == 1:
        raise torch.OutOfMemoryError(f"out of memory. Not even {option}=1 fits.")
    logger.warning("Out of memory with %s=%d: going on with %d.", option, size, size // 2)
    return size // 2
