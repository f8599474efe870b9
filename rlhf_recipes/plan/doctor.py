"""What this machine has and lacks for a run, each lack with the line that mends it."""

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

import bitsandbytes.functional
import torch
from huggingface_hub import get_token
from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE
from packaging.requirements import Requirement

from ..model.base import device
from ..records.cache import cache_folder
from ..records.tracking import wandb_mode

PACKAGE = "rlhf_recipes"
ROOM = 20  # GB that a 7B's files and a run take


class Finding(NamedTuple):
    """One thing that was looked at."""

    what: str
    found: str
    remedy: str | None = None  # what to do, where it is not as it should be
    stops: bool = False  # whether nothing runs without it


def examine() -> list[Finding]:
    """Look at everything. What is slow to ask, such as whether a Hub answers, is not asked."""
    return [*_packages(), *_devices(), _quantization(), *_disks(), _hub(), _tracker()]


def _packages() -> Iterator[Finding]:
    """Python and what the package needs, against the bounds of its own metadata; what it may have beside that."""
    yield Finding("Python", platform.python_version())
    wrong, extras = [], dict[str, list[str]]()
    for requirement in map(Requirement, requires(PACKAGE) or ()):
        extra = str(requirement.marker).partition('extra == "')[2].rstrip('"') if requirement.marker else ""
        is_right = _installed(requirement)
        if extra and requirement.name.replace("-", "_") != PACKAGE:
            extras.setdefault(extra, []).extend([] if is_right else [requirement.name])
        elif not extra and not is_right:
            wrong.append(str(requirement))
    names = ("torch", "transformers", "trl", "peft", "bitsandbytes")
    found = ", ".join(f"{name} {version(name)}" for name in names)
    remedy = f"pip install {' '.join(map(repr, wrong))}" if wrong else None
    yield Finding("Packages", found, remedy, stops=bool(wrong))
    there = [extra for extra, missing in extras.items() if not missing]
    lacking = [extra for extra, missing in extras.items() if missing and extra != "dev"]
    words = f"{', '.join(there) or 'none'}; without {', '.join(lacking) or 'none'}"
    yield Finding(
        "Extras", words, f"pip install '{PACKAGE}[{lacking[0]}]' and so on, where needed" if lacking else None
    )


def _installed(requirement: Requirement) -> bool:
    """Whether a requirement is met."""
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


def _devices() -> Iterator[Finding]:
    """Each GPU with its memory and what it computes in; without one, why."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield Finding("CPU", f"{os.cpu_count()} cores, {memory:.0f} GiB of memory")
    for number in range(torch.cuda.device_count()):
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(number))
        with torch.cuda.device(number):
            in_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        words = f"{torch.cuda.get_device_name(number)}, {free:.1f} of {total:.1f} GiB free, CUDA {torch.version.cuda}, "
        words += "bfloat16" if in_bfloat16 else "float16 with scaled losses (no bfloat16)"
        others = "something else holds memory there: see nvidia-smi" if free < 0.8 * total else None
        yield Finding(f"GPU {number}", words, others)
    if torch.cuda.is_available():
        return
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        remedy = f"torch {torch.__version__} has no CUDA: install one that has, https://pytorch.org/get-started/locally"
    elif torch.version.cuda is not None:
        remedy = "torch sees none: `nvidia-smi` says whether the driver does"
    else:
        remedy = "on a CPU run the recipes tiny and smollm2-sentiment"
    yield Finding("GPU", "none", remedy)


def _quantization() -> Finding:
    """Whether bitsandbytes quantizes to 4 bits here and back, tried on a few numbers."""
    numbers = torch.linspace(-1, 1, 64, device=device())
    try:
        codes, state = bitsandbytes.functional.quantize_4bit(numbers, quant_type="nf4")
        back = bitsandbytes.functional.dequantize_4bit(codes, state)
    except (RuntimeError, AttributeError, ValueError, NotImplementedError) as error:
        return Finding(
            "NF4", f"does not work: {error}", "python -m bitsandbytes says why; quantization=none does without"
        )
    return Finding("NF4", f"works on {numbers.device.type}, off by {(back - numbers).abs().max():.2f} at most")


def _disks() -> Iterator[Finding]:
    """Room where runs and models are written, and whether one may write there."""
    for what, folder in (("Runs", Path("runs")), ("Models", Path(HF_HUB_CACHE)), ("Cache", cache_folder())):
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free / 1e9
        words = f"{folder}: {free:.0f} GB free"
        if not os.access(there, os.W_OK):
            yield Finding(what, words, f"nothing can be written in {there}", stops=what == "Runs")
        else:
            little = f"a 7B takes {ROOM} GB" if free < ROOM and what != "Cache" else None
            yield Finding(what, words, little)


def _hub() -> Finding:
    """Whether the Hub would be asked, and as whom."""
    if HF_HUB_OFFLINE:
        return Finding(
            "Hub", "offline (HF_HUB_OFFLINE)", "models and data must be in the cache, or be folders and files"
        )
    if get_token() is None:
        return Finding("Hub", "no token", "hf auth login, for gated models (Llama, Gemma) and for push")
    return Finding("Hub", "a token is there")


def _tracker() -> Finding:
    """Where W&B's curves would go."""
    mode = wandb_mode()
    return Finding("W&B", mode, "wandb login, or tracker=none" if mode == "offline" else None)


def table(findings: list[Finding]) -> str:
    """A line for each, and one below it for what mends it."""
    width = max(len(finding.what) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.what.ljust(width)}  {finding.found}")
        if finding.remedy is not None:
            lines.append(f"{' ' * width}  {'!' if finding.stops else '-'} {finding.remedy}")
    return "\n".join(lines)
