"""One process at a time in a folder, or at a file that grows row by row."""

import getpass
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from .files import read_json, write_json, writing_in
from .terminal import printable

Wait = Callable[[], None] | None  # is called each second of waiting, and may end it by raising; None: do not wait


@contextmanager
def held(path: Path, wait: Wait = None) -> Iterator[None]:
    """A block in which no other process holds the same folder or file, by whatever path it is named.

    Who writes a file of rows holds it, or the folder that is its own: two processes may get to one in several ways.

    The operating system lets go of what a process holds when that ends, however it ends. On NFS its locks hold between
    machines where the server has them, as NFSv4 does; where a file system has none, a file takes their place, which a
    killed process leaves behind: see `filelock.FileLock`.

    Args:
        path: a folder that is there, in which the lock stands as `.lock`, or a file, beside which it stands.
        wait: what is done for as long as another process holds it, in place of refusing.
    Raises:
        ValueError: another process holds it; the message says which, whose, where and since when. And as `writing_in`
            does, of all that the block writes.
    """
    with writing_in(path), _held(path, wait):
        yield


@contextmanager
def _held(path: Path, wait: Wait) -> Iterator[None]:
    """What `held` does but for the words of what the disk refuses."""
    real = Path(os.path.realpath(path))  # a link's lock is that of what it leads to
    place = real / ".lock" if real.is_dir() else real.with_name(f".{real.name}.lock")
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_symlink():  # filelock does not follow one
        raise ValueError(f"{place} is a link, which may lead anywhere: delete it.")
    owner, lock = place.with_suffix(".owner.json"), FileLock(place)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        message = printable(f"{path} is in use by {_named(owner)}.")
        if wait is None:
            raise ValueError(f"{message} Let it end, or stop it, and run this again.") from None
        print(f"{message} Waiting for it.", file=sys.stderr, flush=True)
        while not lock.is_locked:
            wait()
            with suppress(Timeout):
                lock.acquire(timeout=1)
    try:
        if owner.exists():  # who lets go takes it away
            left = printable(f"{path} was in use by {_named(owner)}, which has ended without letting go: taken over.")
            print(left, file=sys.stderr, flush=True)
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        name = {"process": os.getpid(), "user": _user(), "host": socket.gethostname(), "since": since}
        write_json(owner, name)
        yield
    finally:
        with suppress(OSError):  # it is gone, or its disk can only be read by now
            owner.unlink()
        lock.release()


def _named(owner: Path) -> str:
    """Who holds a lock, in words, as far as it has said so, which it does as soon as it has the lock."""
    for _ in range(4):
        try:
            found = read_json(owner)
            return f"process {found['process']} of {found['user']} on {found['host']}, since {found['since']}"
        except (OSError, ValueError, TypeError, KeyError):  # not there yet, or damaged
            time.sleep(0.05)
    return "another process"


def _user() -> str:
    """The user's name, or number where the machine knows no name, as in some containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
