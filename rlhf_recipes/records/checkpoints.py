"""Checkpoints that say what they hold, by which one that the disk has damaged is known and passed over."""

import hashlib
import logging
import shutil
from pathlib import Path

from .files import read_json, sync_all, write_json
from .folder import checkpoints

SEAL = "files.json"  # in a checkpoint: its files and their SHA-256, in hex

logger = logging.getLogger(__name__)


def seal(checkpoint: Path) -> None:
    """Put a checkpoint on disk and then say in it what each of its files holds; once and for all.

    A power cut can leave files empty or torn that were written before it: only what was synced is safe.
    """
    if not _is_sealed(checkpoint):
        sync_all(checkpoint)
        files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
        write_json(checkpoint / SEAL, {path.relative_to(checkpoint).as_posix(): _sha256(path) for path in files})


def last_checkpoint(folder: Path) -> str | None:
    """The path of a stage folder's newest whole checkpoint; None where there is none.

    Newer ones, which a kill or the disk has damaged, are deleted, since no training could go on from them; it is said.
    So is one without a seal where an older one has it and is whole: after a power cut nobody knows what it holds, and
    once training has begun the older one may be deleted.
    """
    found = checkpoints(folder)
    while found:
        newest = found.pop()
        why = damage(newest)
        if why is None and not _is_sealed(newest) and any(_is_sealed(each) and not damage(each) for each in found):
            why = f"no {SEAL} says what it holds"
        if why is None:
            return str(newest)
        shutil.rmtree(newest)
        then = f"goes on from {found[-1].name}" if found else "begins at its start"
        logger.warning("%s was damaged and is deleted (%s): the stage %s.", newest, why, then)
    return None


def damage(checkpoint: Path) -> str | None:
    """Why no training can go on from a checkpoint, in words; None of a whole one.

    Without a seal, as a kill or a version before 0.5 leaves it, it is taken for whole where `trainer_state.json` is:
    the Trainer writes that last.
    """
    name = SEAL
    try:
        if not _is_sealed(checkpoint):
            name = "trainer_state.json"
            return f"{name} is missing" if read_json(checkpoint / name) is None else None
        for name, written in read_json(checkpoint / SEAL).items():
            if _sha256(checkpoint / name) != written:
                return f"{name} is not what was written"
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return f"{name} is missing"
    except ValueError:  # of what is no JSON, no UTF-8, and no object
        return f"{name} is not JSON"
    return None


def _is_sealed(checkpoint: Path) -> bool:
    return (checkpoint / SEAL).exists()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
