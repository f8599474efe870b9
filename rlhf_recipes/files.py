"""Files that a kill leaves whole: written in one piece, or row by row."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a torn one."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: to a neighbour, flushed to disk, then renamed."""
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(scratch, path)
    _sync_folder(path.parent)


class Journal:
    """A JSONL file that grows by a row at a time, each on disk when `append` returns. One process writes it."""

    def __init__(self, path: Path) -> None:
        """Open the file and read its rows; a last line without its end, which a kill has torn, is cut off.

        Raises ValueError where another line is no JSON object.
        """
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.is_file():
            with path.open("r+b") as stream:
                self._read(stream)

    def _read(self, stream: BinaryIO) -> None:
        for number, line in enumerate(stream, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    stream.truncate(stream.tell() - len(line))
                    return
                raise ValueError(f"{self.path}, line {number}: not JSON ({error}).") from error
            if not isinstance(row, dict):
                raise ValueError(f"{self.path}, line {number}: {type(row).__name__}, not an object.")
            self.rows.append(row)
            if not line.endswith(b"\n"):  # an editor may leave out the last one
                stream.write(b"\n")

    def append(self, row: dict[str, Any]) -> None:
        """Write a row, flushed and synced to disk. Where that fails (a full disk) the file stays as it was."""
        new, line = not self.path.exists(), (json.dumps(row) + "\n").encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as stream:
            size = stream.tell()
            try:
                if stream.write(line) < len(line):
                    raise OSError(errno.ENOSPC, "there is no room for another row", str(self.path))
                os.fsync(stream.fileno())
            except OSError:
                stream.truncate(size)
                raise
        if new:
            _sync_folder(self.path.parent)
        self.rows.append(row)

    def remove(self, unwanted: Callable[[dict[str, Any]], bool]) -> None:
        """Take rows out again. The file is replaced in one step, so that no other row is ever at risk."""
        kept = [row for row in self.rows if not unwanted(row)]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.rows = kept


def _sync_folder(folder: Path) -> None:
    """Put a new name in a folder on disk, where folders can be opened for that (not on Windows)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
