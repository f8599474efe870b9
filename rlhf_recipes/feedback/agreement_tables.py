"""The report of agreement, for the terminal."""

import json
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..records.terminal import printable
from .pairs import coefficient_in_words, share_in_words

PACE = {"seconds": ".1f", "an_hour": ".0f", "fast": ".0%"}  # of what `habits.pace` says: the formats


def show_agreement(numbers: dict[str, Any], as_json: bool = False) -> None:
    """Print the report: as JSON, or as tables and warnings. What cannot be said is left blank."""
    if as_json:
        print(json.dumps(numbers, indent=2))
        return
    console = Console(highlight=False)
    for table in _tables(numbers):
        console.print(table)
    for line in (_overall(numbers), *(f"Warning: {warning}" for warning in numbers["warnings"])):
        console.print(Text(line))


def _tables(numbers: dict[str, Any]) -> Iterator[Table]:
    """Two labelers at a time, what each one's judgements are worth, what they lean to, and how they are made."""
    between = _table("labelers", "prompts", "agreement", "Cohen's kappa")
    for pair in numbers["between"]:
        agreement, names = pair["agreement"], " and ".join(map(printable, pair["labelers"]))
        cells = (f"{agreement['prompts']:,}", share_in_words(agreement), coefficient_in_words("kappa", pair))
        between.add_row(Text(names), *cells)
    worth = _table("labeler", "labels", "ties", "with majority", "accuracy", "weight")
    leaning = _table("labeler", "shown first", "longer", "same again")
    making = _table("labeler", "seconds", "an hour", "too fast", "longest run", "its chance")
    for name, own in numbers["labelers"].items():
        first, pace, streak = Text(printable(name)), own["pace"] or {}, own["streak"] or {}
        counts = (f"{own['labels']:,}", f"{own['ties']:.1%}", share_in_words(own["majority"]))
        worth.add_row(first, *counts, _format(own["accuracy"], ".1%"), f"{own['weight']:.2f}")
        leaning.add_row(first, *(share_in_words(own[key]) for key in ("first_shown", "longer", "again")))
        paces = [_format(pace.get(key), form) for key, form in PACE.items()]
        making.add_row(first, *paces, _format(streak.get("length"), "d"), _format(streak.get("chance"), ".2g"))
    yield from (between, worth, leaning, making) if numbers["between"] else (worth, leaning, making)


def _overall(numbers: dict[str, Any]) -> str:
    """The line that says how much was judged, and how far all agree."""
    counts = f"{numbers['labels']:,} judgements of {numbers['prompts']:,} prompts."
    agreement = numbers["agreement"]
    if agreement is None:
        return counts
    return (
        f"{counts} Where two judged the same, they agree on {share_in_words(agreement, 1)} of the pairs of responses "
        f"({agreement['prompts']:,} prompts); InstructGPT's labelers agreed on 72.6 ± 1.5 %. Krippendorff's alpha: "
        f"{coefficient_in_words('alpha', numbers) or 'not defined'}. In parentheses: 95 % intervals."
    )


def _table(first: str, *others: str) -> Table:
    """An empty table of names in the first column and numbers in the others."""
    table = Table(first)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _format(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
