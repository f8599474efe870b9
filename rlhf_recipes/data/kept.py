"""How much of the machine's memory the rows of a source may take: a file of kilobytes may hold more, packed."""

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

VALUE = 64  # bytes of Python's for a value in a list or a dictionary, beside its text
ROW = 1_000  # bytes that a row takes beside its cells


def row_bytes(row: Any) -> int:
    """Bytes of Python's objects that a row of JSON's values takes."""
    taken, parts = ROW, [row]
    while parts:
        part = parts.pop()
        taken += sys.getsizeof(part)
        if isinstance(part, dict):
            parts += part.keys()
            parts += part.values()
        elif isinstance(part, list | tuple):
            parts += part
    return taken


def most_bytes() -> int:
    """Bytes that rows may take: half of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def check_kept(taken: int, name: str) -> None:
    """Raises ValueError where so many bytes of rows of what has this name are more than may be kept."""
    if taken > most_bytes():
        raise ValueError(
            f"{name}: its rows take more than half of this machine's memory ({most_bytes() / 1e9:.1f} GB): "
            "set a `limit`, which takes fewer of them, or split it."
        )


def kept(rows: Iterable[Any], name: str) -> Iterator[Any]:
    """Rows that are all kept, as they come. Raises ValueError before they fill the memory."""
    taken = 0
    for row in rows:
        taken += row_bytes(row)
        check_kept(taken, name)
        yield row
