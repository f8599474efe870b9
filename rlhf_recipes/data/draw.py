"""Which rows a `limit` takes: those whose prompts hash lowest, so that they are like the whole in whatever order."""

import heapq
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from tqdm.auto import tqdm

from ..recipe.lookup import is_function
from ..recipe.values import Source
from .kept import check_kept, row_bytes
from .rows import Survey, row_prompt
from .split import drawing_hash


def draw(numbered: Iterable[tuple[int, Any]], source: Source, seed: int) -> Iterator[tuple[int, Any]]:
    """The rows of a source that a stage takes: all or, where it has more, `source.limit` of them, in their order.

    They are the same each time, in each stage and in whatever order the source has them, and more of them with a larger
    limit. Those of one prompt come together. All rows are read for it, but no more than `limit` are held.

    A function makes its rows in the order that it chooses, and may never end: of one it is the first rows.

    Args:
        numbered: the rows with their numbers, as `read` gives them.
        seed: of the recipe: another one draws other rows.
    """
    if source.limit is None or is_function(source.data):
        return islice(numbered, source.limit)
    rename = Survey(source).rename
    bar = tqdm(numbered, f"drawing from {source.data}", unit=" rows", disable=None, leave=False)
    lowest: list[tuple[int, int, int, Any]] = []  # of each row the hash and the number, negative, its bytes, and itself
    taken = 0
    for number, row in bar:
        item = (-_row_hash(rename(row), seed), -number, row_bytes(row), row)
        taken += item[2]
        if len(lowest) < source.limit:
            heapq.heappush(lowest, item)
        else:
            taken -= heapq.heappushpop(lowest, item)[2]
        check_kept(taken, source.data)
    return iter(sorted(((-number, row) for _, number, _, row in lowest), key=lambda item: item[0]))


def _row_hash(row: Any, seed: int) -> int:
    """A hash of a row's prompt or, where it has none that can be used, of the row."""
    prompt = row_prompt(row)
    return drawing_hash(repr(row) if prompt is None else prompt, seed)
