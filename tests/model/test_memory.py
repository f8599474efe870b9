"""Memory that is free goes back to the system."""

import sys

import pytest
import torch

from rlhf_recipes.model.memory import ran_out, resident_mib


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's count of resident memory, and glibc")
def test_what_is_freed_goes_back_to_the_system() -> None:
    def fails() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    blocks = [torch.ones(2**14) for _ in range(3000)]  # 64 KiB each, which come from the heap
    kept = blocks[::50]
    before = resident_mib()
    del blocks
    assert ran_out(fails)
    assert resident_mib() < before - 100 and len(kept) == 60
