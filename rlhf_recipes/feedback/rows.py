"""Files of samples, which wait for a judgement, and of labels (their rows: see `rlhf_recipes.feedback`)."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..data.prepare import read_judged

Row = dict[str, Any]


def read_samples(path: Path) -> list[Row]:
    """The samples of a file, each with an `id` of its own.

    Raises ValueError, naming file, row and field, for one that cannot be ranked, and for two with the same id.
    """
    rows = [{**row, "id": _id(row)} for row in read_judged("rank", path)]
    ids: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        if row["id"] in ids:
            raise ValueError(
                f"{path}, row {number}, field 'id': {row['id']!r} is that of row {ids[row['id']]} as well."
            )
        ids[row["id"]] = number
    return rows


def read_labels(paths: Iterable[Path]) -> list[Row]:
    """The judgements in some files of labels, with an `id` each.

    Raises ValueError, naming file, row and field, for one that is no ranking or has no labeler.
    """
    rows = []
    for path in paths:
        for number, row in enumerate(read_judged("label", path), 1):
            if not isinstance(row.get("labeler"), str) or not row["labeler"].strip():
                raise ValueError(f"{path}, row {number}, field 'labeler': a judgement needs the name of who made it.")
            rows.append({**row, "id": _id(row)})
    return rows


def _id(row: Row) -> str:
    """The row's own id, or one made of what is judged."""
    if row.get("id") is not None:
        return str(row["id"])
    return hashlib.sha256(json.dumps([row["prompt"], row["responses"]]).encode()).hexdigest()[:16]
