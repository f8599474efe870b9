"""GPUs by name, and what each has."""

import dataclasses
import difflib
import re
from dataclasses import dataclass
from typing import Any

import torch

from ..recipe.values import Recipe


@dataclass(frozen=True)
class Card:
    """A GPU. Of one that is only a size of memory the rest is not known."""

    name: str
    gib: float  # of memory, as CUDA counts it: what the driver and error correction leave of the data sheet's
    gb_per_s: float | None = None  # bandwidth of its memory
    tflops: float | None = None  # dense products of 16-bit numbers, added up in float32
    bfloat16: bool = True
    device: str = ""  # a part of what CUDA calls it
    link: float | None = None  # GB/s to another card of the machine, in one direction


# Bandwidth and rate are those that NVIDIA states in data sheets and whitepapers (half of a rate "with sparsity"), of
# RTX 3060 and 4060 Ti four operations a core and cycle. Those of data-center cards and the A6000 were compared with a
# second table, the others with none. Of a card that is sold in several forms it is the slowest one that is not named.
# The memory is what PyTorch calls the total capacity where it runs out, as far as public issues show it (4090, 5090,
# L40S, T4, A30, A4000, A5000), of H200 what was measured, and else about 2 % less than the name says.
# The link is PCIe's by the data sheets: 1 (version 3), 2 (4) or 4 GB/s (5) a lane, of which RTX 4060 Ti has 8 and all
# others 16; or NVLink's, half of what they state of both directions. Bridges between pairs are left out, and so is
# NVLink of V100 and A100, which are sold without. That GeForce cards reach each other through the CPU's memory is too.
CARDS = (
    Card("t4", 14.5, 300, 65, False, "T4", 16),
    Card("v100-16", 15.7, 900, 112, False, "V100", 16),
    Card("v100-32", 31.7, 900, 112, False, "V100", 16),
    Card("rtx2080ti", 10.7, 616, 53.8, False, "RTX 2080 Ti", 16),
    Card("rtx3060-12", 11.7, 360, 25.5, True, "RTX 3060", 32),
    Card("rtx3090", 23.6, 936, 71, True, "RTX 3090", 32),
    Card("a10", 22.0, 600, 125, True, "A10", 32),
    Card("a30", 23.5, 933, 165, True, "A30", 32),
    Card("a40", 44.3, 696, 149.7, True, "A40", 32),
    Card("a4000", 15.6, 448, 76.7, True, "RTX A4000", 32),
    Card("a5000", 23.6, 768, 111.1, True, "RTX A5000", 32),
    Card("a6000", 47.4, 768, 154.8, True, "RTX A6000", 32),
    Card("a100-40", 39.4, 1555, 312, True, "A100", 32),
    Card("a100-80", 79.1, 1935, 312, True, "A100", 32),
    Card("rtx4060ti-16", 15.6, 288, 44.1, True, "RTX 4060 Ti", 16),
    Card("rtx4080", 15.6, 717, 97.5, True, "RTX 4080", 32),
    Card("rtx4090", 23.5, 1008, 165.2, True, "RTX 4090", 32),
    Card("rtx6000ada", 47.4, 960, 364.2, True, "RTX 6000 Ada", 32),
    Card("l4", 22.0, 300, 121, True, "L4", 32),
    Card("l40s", 44.4, 864, 362, True, "L40S", 32),
    Card("rtx5080", 15.4, 960, 112.6, True, "RTX 5080", 64),
    Card("rtx5090", 31.3, 1792, 209.5, True, "RTX 5090", 64),
    Card("h100-pcie", 79.1, 2000, 756, True, "H100 PCIe", 64),
    Card("h100", 79.1, 3350, 989, True, "H100", 450),
    Card("h200", 139.7, 4800, 989, True, "H200", 450),
)


def card_of(text: str) -> Card:
    """The GPU of a name (`rtx4090`, `RTX 4090`, `a100-40`), or of a size (`24GiB`, `24GB`, `24576MiB`; `24`, in GiB).

    Raises ValueError for anything else, with the names that are nearest.
    """
    known, plain = {_plain(card.name): card for card in CARDS}, _plain(text)
    for name in (plain, f"rtx{plain}"):
        if name in known:
            return known[name]
    units = {"": 1, "gib": 1, "gb": 10**9 / 2**30, "mib": 1 / 2**10, "mb": 10**6 / 2**30}
    match = re.fullmatch(r"([0-9.]+)\s*([a-z]*)", text.strip().lower())
    if match is not None and match[2] in units and match[1].count(".") <= 1:
        return Card(text, float(match[1]) * units[match[2]])
    near = [name for name in known if plain and name.startswith(plain)] or difflib.get_close_matches(plain, known, 3, 0)
    raise ValueError(
        f"--gpu={text} is no GPU that is known and no size of memory. The nearest: "
        f"{', '.join(known[name].name for name in near)}. A size is written 24GiB, 24GB or 24576MiB."
    )


def _plain(name: str) -> str:
    """A name without what is written in several ways: `NVIDIA GeForce RTX 4090` is rtx4090."""
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())


def card_called(name: str, gib: float) -> Card | None:
    """The GPU that CUDA calls by a name (`NVIDIA A100-SXM4-40GB`), and that has so much memory; None: none is known."""
    called = (card for card in CARDS if re.search(rf"\b{card.device}\b", name))
    return next((card for card in called if abs(card.gib - gib) < 0.1 * gib), None)


def this_card() -> Card | None:
    """The GPU of this machine; None where it has none, or one that is not known."""
    if not torch.cuda.is_available():
        return None
    return card_called(torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory / 2**30)


def on_card(recipe: Recipe, card: Card) -> Recipe:
    """The recipe in the precision that it has on a card: without bfloat16, float16 in its place."""
    if card.bfloat16 or recipe.base.dtype != "auto":
        return recipe
    base: Any = dataclasses.replace(recipe.base, dtype="float16")
    return dataclasses.replace(recipe, base=base)
