"""Files of samples, which wait for a judgement, and of labels (their rows: see `rlhf_recipes.feedback`)."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import data
from ..chat import Text

Row = dict[str, Any]


def read_samples(path: Path) -> list[Row]:
    """The samples of a file, each with an `id` of its own.

    Raises ValueError, naming file, row and field, for one that cannot be ranked, and for two with the same id.
    """
    rows = [{**row, "id": _id(row)} for row in data.items("rank", path)]
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
        for number, row in enumerate(data.items("label", path), 1):
            if not isinstance(row.get("labeler"), str) or not row["labeler"].strip():
                raise ValueError(f"{path}, row {number}, field 'labeler': a judgement needs the name of who made it.")
            rows.append({**row, "id": _id(row)})
    return rows


def _id(row: Row) -> str:
    """The row's own id, or one made of what is judged."""
    if row.get("id") is not None:
        return str(row["id"])
    return hashlib.sha256(json.dumps([row["prompt"], row["responses"]]).encode()).hexdigest()[:16]


def text(part: Text) -> str:
    """A prompt or a response as people read it: messages with the name of who speaks, where there are several."""
    if isinstance(part, str):
        return part
    if len(part) == 1:
        return part[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in part)


def printable(text: str, keep: str = "") -> str:
    """A text that can do nothing to a terminal: what does not print is escaped, but for the characters in `keep`."""
    shown = (
        c if c.isprintable() or c in keep else c.encode("unicode_escape", "backslashreplace").decode() for c in text
    )
    return "".join(shown)
