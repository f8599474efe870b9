"""Files of samples, which wait for a judgement, and of labels (their rows: see `rlhf_recipes.feedback`)."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.prepare import read_judged
from ..records.digest import row_id
from ..records.files import beside, check_place, read_json, write_json

Row = dict[str, Any]

logger = logging.getLogger(__name__)

# What a judgement adds to a sample.
JUDGEMENT = ("ranking", "preferences", "weight", "labeler", "seconds", "order", "time", "note", "flag", "skipped")
JUDGEMENT += ("browser",)  # in which it was given
JUDGEMENT += ("sheet", "all_bad")  # answers to the questions of `sheet`; that none of the responses, which tie, is good


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


def keep_settings(out: Path, now: Mapping[str, Any], what: str, others: Sequence[Path] = ()) -> None:
    """Write beside a file of rows what they are made with, so that rows of something else are not mixed with them.

    Rows without it, or without some of it, as earlier versions wrote them, are taken for rows of the same; it is said.

    Args:
        out: the file.
        now: JSON values by their names.
        what: its rows are, in a word.
        others: files beside it that may hold rows as well.
    Raises:
        ValueError: rows of something else are there.
    """
    path, now = beside(out, "settings.json"), json.loads(json.dumps(dict(now)))
    if there := [str(file) for file in (out, *others) if file.is_file() and file.stat().st_size]:
        before = read_json(path) or {}
        if other := [key for key in now if before.get(key, now[key]) != now[key]]:
            changes = "; ".join(f"{key}: {before[key]!r} there, {now[key]!r} here" for key in other)
            raise ValueError(
                f"{out} holds {what} of other settings ({changes}): name another file, or delete {' and '.join(there)}."
            )
        if unknown := ", ".join(key for key in now if key not in before):
            logger.warning(
                "%s does not say of which %s its %s are: they are taken for those of now.", out, unknown, what
            )
    if now:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, now)


def labels_beside(samples: Path) -> Path:
    """Where the labels of a file of samples go, unless another place is named. Raises ValueError for a folder."""
    check_place(samples)
    return samples.with_name(samples.name.removesuffix(".gz")).with_suffix(".labels.jsonl")


def read_labels(paths: Iterable[Path]) -> list[Row]:
    """The labels of some files, in their order, with an `id` each.

    Raises ValueError, naming file, row and field, for one that is no ranking or has no labeler.
    """
    rows = []
    for path in paths:
        for number, row in enumerate(read_judged("label", path), 1):
            if not isinstance(row.get("labeler"), str) or not row["labeler"].strip():
                raise ValueError(f"{path}, row {number}, field 'labeler': a judgement needs the name of who made it.")
            rows.append({**row, "id": _id(row)})
    return rows


def read_judgements(paths: Iterable[Path]) -> list[Row]:
    """The labels of some files as judgements that can be compared, in the order of their `time`.

    Raises ValueError, naming file, row and field, for one that is no judgement, or that shares its id with another but
    not its prompt and responses.
    """
    rows: list[Row] = []
    first: dict[str, tuple[str, Row]] = {}
    for path in paths:
        for number, row in enumerate(read_labels([path]), 1):
            where = f"{path}, row {number}"
            _check_judgement(row, where)
            there, other = first.setdefault(row["id"], (where, row))
            if (row["prompt"], row["responses"]) != (other["prompt"], other["responses"]):
                raise ValueError(
                    f"{where}, field 'responses': the id {row['id']!r} is that of {there} as well, with another prompt "
                    "or other responses. Judgements of one id must be of one sample: correct the id."
                )
            rows.append(row)
    return sorted(rows, key=lambda row: str(row.get("time") or ""))


def _check_judgement(row: Row, where: str) -> None:
    """Raises ValueError, which begins with `where`, for an order or seconds that cannot be."""
    order, seconds, count = row.get("order"), row.get("seconds"), len(row["responses"])
    whole = isinstance(order, list) and all(type(index) is int for index in order)
    if order is not None and not (whole and sorted(order) == list(range(count))):
        raise ValueError(
            f"{where}, field 'order': {order!r} is not the responses' numbers, 0 to {count - 1}, in the order shown."
        )
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 <= seconds < 1e9
    if seconds is not None and not number:
        raise ValueError(f"{where}, field 'seconds': {seconds!r} is no number of seconds.")


def _id(row: Row) -> str:
    """The row's own id, or one made of what is judged."""
    if row.get("id") is not None:
        return str(row["id"])
    return row_id([row["prompt"], row["responses"]])
