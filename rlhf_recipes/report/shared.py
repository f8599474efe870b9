"""What several runs have alike is said once."""

from collections.abc import Iterable, Sequence
from typing import Any

from .gather import RunContents


def shared_by_runs(
    runs: Sequence[RunContents], entries: Iterable[tuple[int, str, Any]]
) -> list[tuple[str, int | None, Any]]:
    """What several runs have alike, once: with the names of those runs before its label, unless all have it.

    Args:
        entries: the number of a run, a label, and what the run has under it.
    Returns:
        label, colour (that of the first of those runs; None where all have it) and what they have, in the order of
        the entries.
    """
    groups: list[tuple[str, Any, list[int]]] = []
    for index, label, value in entries:
        same = next((group for group in groups if group[:2] == (label, value) and index not in group[2]), None)
        if same is None:
            groups.append((label, value, [index]))
        else:
            same[2].append(index)
    return [
        (label, None, value)
        if len(having) == len(runs)
        else (f"{', '.join(runs[index].name for index in having)}: {label}", having[0], value)
        for label, value, having in groups
    ]
