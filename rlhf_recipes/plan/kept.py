"""Dry runs that are kept: in this process, and on disk for the next one.

What a shape takes stays the same as long as the model's configuration, the libraries and the code that is run dry do.
An entry's name is made of all of these, so no entry is ever out of date. The folder may be deleted at any time.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
from contextlib import suppress
from pathlib import Path

from ..model.base import base_config, precision
from ..records.cache import cache_folder
from ..records.files import read_json, write_json
from .dry_run import Shape, dry_run

LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
CODE = ("model", "plan", "stages/ppo")  # folders of this package whose code a dry run runs, or reads its roles from


@functools.cache
def kept_dry_run(shape: Shape, layers: int, phase: str) -> dict[str, float]:
    """The numbers of `dry_run`, read from disk where they have been found before, and else found and kept there."""
    if shape.base.trust_remote_code:  # the model's own code is no part of its configuration
        return dry_run(shape, layers, phase)
    entry = cache_folder() / "dry_runs" / f"{entry_name(shape, layers, phase)}.json"
    if entry.is_file():
        return read_json(entry)
    numbers = dry_run(shape, layers, phase)
    with suppress(OSError):  # a plan needs no disk, which may be full or read-only
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_json(entry, numbers)
    return numbers


def entry_name(shape: Shape, layers: int, phase: str) -> str:
    """A digest of all that a dry run depends on. Where the model lies is no part of it: its configuration is."""
    base = {"precision": str(precision(shape.base))}
    base |= {name: getattr(shape.base, name) for name in ("quantization", "attn_implementation")}
    config = base_config(shape.base).to_dict()
    config.pop("_name_or_path", None)
    parts = [dataclasses.asdict(shape) | {"base": base}, layers, phase, config, versions(), code_digest()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


@functools.cache
def versions() -> dict[str, str]:
    """The versions of `LIBRARIES`."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


@functools.cache
def code_digest() -> str:
    """A digest of the files in `CODE`."""
    package = Path(__file__).parents[1]
    files = sorted(file for folder in CODE for file in (package / folder).glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
