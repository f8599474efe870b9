"""Files that a kill leaves whole: written in one piece, or row by row."""

import errno
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

REFUSALS = {  # of a disk, by the system's number for it, and what to do
    errno.ENOSPC: "the disk is full: make room",
    errno.EDQUOT: "the quota is used up: make room",
    errno.EROFS: "this disk can only be read: name a folder on another one",
    errno.EACCES: "its permissions forbid it: change them, or name another",
    errno.EIO: "the disk fails: name a folder on another one",
    errno.ENOENT: "it was deleted or moved while this ran: put it back",
    errno.EEXIST: "something else has this name: name another, or delete it",
    errno.ENOTDIR: "it is no folder: name another",
    errno.EISDIR: "it is a folder, and no file: name another",
    errno.ENAMETOOLONG: "the name is too long: name a shorter one",
}
# Errors of what safetensors and tokenizers (Rust), and torch, write: they have no number, but mostly its words.
LIBRARIES = re.compile(r"\(os error \d+\)|inline_container\.cc.*(strerror|unexpected pos|PytorchStreamWriter)")
LONGEST_ROW = 2**26  # bytes of a line: what is longer is no row

WRITE_AGAIN = "Delete it, or run what writes it again."

Row = dict[str, Any]  # of a JSONL file: whoever writes it says which keys it has


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a torn one."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: to a neighbour, flushed to disk, then renamed. Raises ValueError as `check_place`."""
    check_place(path)
    scratch = path.with_name(f"{path.name}.{uuid4().hex}.tmp")  # another one may be writing the same file
    try:
        with scratch.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(scratch, path)
    except OSError as error:
        error.filename = str(path)  # which is not said of what cannot be written, or is the neighbour's name
        raise
    finally:
        with suppress(OSError):  # it is renamed, or its disk can only be read
            scratch.unlink()  # where the disk is full it would take what room is left
    _sync(path.parent)


def check_place(path: Path) -> None:
    """Raises ValueError where no file can be: of a folder, and of a device (/dev/null), whose place it would take."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: {REFUSALS[errno.EISDIR] if path.is_dir() else 'it is no file: name another'}.")


def read_json(path: Path, kind: type = dict, advice: str = WRITE_AGAIN) -> Any:
    """What a JSON file holds; None where there is no file.

    Args:
        kind: of what it holds.
        advice: what to do about a damaged one.
    Raises:
        ValueError: it is damaged, or holds something else.
    """
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}). {advice}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path}: {type(value).__name__}, which is not what this package writes. {advice}")
    return value


def read_rows(path: Path) -> list[Row]:
    """The whole rows of a JSONL file, none where there is no file. Another process may be writing it.

    Raises ValueError where a line is no JSON object.
    """
    return _rows(path)[0]


class RowsReader:
    """`read_rows` for who reads growing files again and again: of a file that has only grown, what is new is read."""

    def __init__(self) -> None:
        self.known: dict[Path, tuple[list[Row], int, bytes]] = {}  # rows, the bytes that they take, the last of these

    def __call__(self, path: Path) -> list[Row]:
        """The rows of a JSONL file whose lines have ended. The list is the reader's own, and grows at the next call."""
        rows, whole, last = self.known.pop(path, ([], 0, b""))
        if _bytes_before(path, whole) != last:  # rows were dropped, or it is another file
            rows, whole = [], 0
        whole = _rows(path, rows, whole)[1] or 0
        self.known[path] = rows, whole, _bytes_before(path, whole)
        return rows


def _bytes_before(path: Path, end: int) -> bytes:
    """The last 4 KiB before a place in a file, by which it is known again; none of a file that is not there."""
    if not end or not path.is_file():
        return b""
    with path.open("rb") as stream:
        start = stream.seek(max(0, end - 4_096))
        return stream.read(end - start)


def _rows(path: Path, known: list[Row] | None = None, whole: int = 0) -> tuple[list[Row], int | None]:
    """The rows of a JSONL file, and the bytes that they take; None where there are none.

    Args:
        known: the rows that were read before, to which those are added whose lines have ended.
        whole: the bytes that they take.
    """
    rows = [] if known is None else known
    if not path.is_file():
        return [], None
    with path.open("rb") as stream:
        stream.seek(whole)
        for number, line in enumerate(iter(lambda: stream.readline(LONGEST_ROW + 1), b""), len(rows) + 1):
            if len(line) > LONGEST_ROW:  # a file of no blocks may have gigabytes
                raise ValueError(f"{path}, line {number}: longer than {LONGEST_ROW:,} bytes.")
            if known is not None and not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                if b"\0" in line:
                    lost = "holds NUL bytes, as a power cut leaves them. Delete what stands from there on"
                    raise ValueError(f"{path}, line {number}: {lost}, or bring the file back from a copy.") from error
                if line.startswith(b"{") and not line.endswith(b"\n"):
                    break  # a kill has torn it; what does not begin like a row was never one
                raise ValueError(f"{path}, line {number}: not JSON ({error}).") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: {type(row).__name__}, not an object.")
            rows.append(row)
            whole += len(line)
    return rows, whole


def beside(path: Path, kind: str) -> Path:
    """The file of a kind (`asked.jsonl`) that stands beside a file of rows, and beside no other.

    Raises ValueError where the name of the rows does not end in .jsonl, so that two files would have the same beside.
    """
    if path.suffix != ".jsonl":
        raise ValueError(f"{path}: the name of a file of rows must end in .jsonl, as {path.name}.jsonl does.")
    return path.with_suffix(f".{kind}")


# W&B makes this link, to a log of its own in the cache of who ran it, in a new folder each time. Nothing reads it.
WANDBS_LINK = "wandb/*run-*/logs/debug-core.log"


def check_links(folder: Path) -> None:
    """Raises ValueError where a link in a folder leads out of it: to read or write there is to do it elsewhere.

    W&B's own may: a run folder that was copied here has them.
    """
    root = os.path.realpath(folder)
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *files)):
            if not path.is_symlink() or path.match(WANDBS_LINK):
                continue
            # realpath never fails, as Path.resolve does on a link to itself.
            if not Path(os.path.realpath(path)).is_relative_to(root):
                raise ValueError(f"{path} is a link that leads out of {folder}: delete it, or put there what it is of.")


@contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """A block that writes in a folder, or a file. Raises ValueError, which says what to do, where the disk refuses."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        place = Path(getattr(error, "filename", None) or folder)
        why = _refusal(error, place)
        if why is None:
            raise
        place = place if os.path.isdir(place.parent) else place.parent  # which bears a name of any length
        raise ValueError(f"{place}: {why} ({error}). What is there is safe: then run the same again.") from error


def _refusal(error: Exception, place: Path) -> str | None:
    """What the disk has against something, and what to do; None where an error is of something else."""
    if isinstance(error, OSError):  # a file may be missing for other reasons than that its folder is gone
        return None if error.errno == errno.ENOENT and place.parent.is_dir() else REFUSALS.get(error.errno or 0)
    if str(error).startswith("Parent directory"):  # torch's words
        return REFUSALS[errno.ENOENT]
    if not LIBRARIES.search(str(error)):
        return None
    words = (why for number, why in REFUSALS.items() if os.strerror(number) in str(error))
    return next(words, "it cannot be written: make room, or see to the quota")


class Journal:
    """A JSONL file that grows by a row at a time, each on disk when `append` returns.

    One process writes it: who opens it holds it by `lock.held`, or the folder that is its own.
    """

    def __init__(self, path: Path, keys: Sequence[str] = ()) -> None:
        """Open the file and read its rows; a last line without its end, which a kill has torn, is cut off.

        Args:
            keys: what each row has, if this package has written it.
        Raises:
            ValueError: another line is no JSON object, a row lacks a key, or it is no file, or a link, which may lead
                anywhere, or has several names, by each of which another process could hold it.
        """
        check_place(path)
        if path.is_symlink():
            raise ValueError(f"{path} is a link, and is not written through: name the file itself, or delete the link.")
        if path.is_file() and path.stat().st_nlink > 1:
            raise ValueError(
                f"{path} has other names (hard links), whose rows these are, too: put a copy in its place."
            )
        self.path = path
        self.rows, whole = _rows(path)
        for number, row in enumerate(self.rows, 1):
            if lacks := [key for key in keys if key not in row]:
                raise ValueError(
                    f"{path}, row {number}: it has no {lacks[0]!r}, and is of something else. Name another file."
                )
        if whole is not None:
            with path.open("r+b") as stream:
                stream.truncate(whole)
                stream.seek(max(whole - 1, 0))
                if whole and stream.read() != b"\n":  # an editor may leave out the last one
                    stream.write(b"\n")

    def append(self, *rows: Row) -> None:
        """Write rows, flushed and synced to disk. Where that fails (a full disk) the file stays as it was.

        Raises ValueError where the file was deleted: a new one would have these rows alone.
        """
        new, lines = not self.path.exists(), "".join(json.dumps(row) + "\n" for row in rows).encode()
        if new and self.rows:
            raise ValueError(
                f"{self.path} was deleted or moved while this ran, with {len(self.rows)} rows: put it back, and run "
                "the same again."
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as stream:
            size = stream.tell()
            try:
                if stream.write(lines) < len(lines):
                    raise OSError(errno.ENOSPC, "there is no room for another row", str(self.path))
                os.fsync(stream.fileno())
            except OSError:
                stream.truncate(size)
                raise
        if new:
            _sync(self.path.parent)
        self.rows += rows

    def remove(self, unwanted: Callable[[Row], bool]) -> None:
        """Take rows out again. The file is replaced in one step, so that no other row is ever at risk."""
        self._write([row for row in self.rows if not unwanted(row)])

    def restore(self) -> None:
        """Write the file again, with all its rows, where it was deleted."""
        if self.rows and not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write(self.rows)

    def _write(self, rows: list[Row]) -> None:
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self.rows = rows


def sync_all(*paths: Path) -> None:
    """Put files and whole folders on disk, under their names: what says that they are whole comes after."""
    for path in paths:
        for each in (*path.rglob("*"), path, path.parent):
            if each.is_dir() or each.is_file():
                _sync(each)


def _sync(path: Path) -> None:
    """Put a file, or the names in a folder, on disk, where they can be opened for that (not on Windows)."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
