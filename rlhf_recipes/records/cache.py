"""The user's cache, beside all run folders: what costs time and is the same for all of them."""

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from huggingface_hub.constants import HF_HOME

from .digest import digest
from .files import write_text

REMEMBERED = 2**26  # bytes: the hash of more is kept


def cache_folder() -> Path:
    """$RLHF_RECIPES_CACHE, or a folder beside Hugging Face's."""
    return Path(os.environ.get("RLHF_RECIPES_CACHE") or Path(HF_HOME).parent / "rlhf_recipes").expanduser()


def hash_of_files(files: Sequence[Path]) -> str:
    """SHA-256 of the names, sizes and bytes of files, in hex, remembered for as long as none of them is written to.

    A model of 15 GB takes ten seconds or more to hash; what takes no time is not remembered.
    """
    stats = [(str(file.resolve()), *_last_written(file)) for file in files]
    known = cache_folder() / "hashes" / digest(stats)
    is_large = sum(file.stat().st_size for file in files) > REMEMBERED
    if is_large and known.is_file():
        return known.read_text()
    found = hashlib.sha256()
    for file in files:
        found.update(f"{file.name} {file.stat().st_size}".encode())
        with file.open("rb") as stream:
            while part := stream.read(2**20):
                found.update(part)
    if is_large:
        with suppress(OSError):  # without a cache it is hashed again
            known.parent.mkdir(parents=True, exist_ok=True)
            write_text(known, found.hexdigest())
    return found.hexdigest()


def _last_written(file: Path) -> tuple[int, int, int]:
    """What changes when a file is written to; its second time cannot be set back."""
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
