"""What every test needs before torch is imported: one thread (faster for tiny tensors), no network, its own cache."""

import os
import tempfile

import pytest

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false",
}
if "RLHF_RECIPES_CACHE" not in os.environ:
    # Made by the first process; the workers of pytest-xdist inherit the variable. It is removed when that process ends.
    _cache = tempfile.TemporaryDirectory(prefix="rlhf-recipes-tests-")
    os.environ["RLHF_RECIPES_CACHE"] = _cache.name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
