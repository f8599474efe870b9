"""What people said of the models' answers in the arena, and how far other judges agree with them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .blocks import Interval, Intervals, Table, TableRow, number, percent
from .gather import RunContents, by_judge, title_of
from .shared import shared_by_runs


def people(runs: Sequence[RunContents]) -> Iterator[Any]:
    """Each person's preferences, what a sheet found, the models' strengths, and agreement with other judges."""
    said_of = [(index, (run.evaluation or {}).get("people")) for index, run in enumerate(runs)]
    judged = [(index, said) for index, said in said_of if said]
    rates = [
        (index, f"{row['person']}: {title_of(row['model'])} against {title_of(row['against'])}", row)
        for index, said in judged
        for row in (said["by_person"] if len(said["people"]) > 1 else [])
    ]
    if rates:
        yield Intervals("Wins by person", _intervals(runs, rates), "Each person's own judgements; a tie counts half.")
    bad = [
        (index, f"{title_of(row['model'])} and {title_of(row['against'])}", row)
        for index, said in judged
        for row in said["all_bad"]
        if row["rate"] > 0
    ]
    if bad:
        yield Intervals("Both bad", _intervals(runs, bad), "Share of the judgements that found neither answer good.")
    yield from _by_model(runs, judged)
    agreeing = [
        (index, "people with each other" if judge == "people" else by_judge(judge), rate)
        for index, said in judged
        for judge, rate in said["agreement"].items()
    ]
    if agreeing:
        note = "How often a judge prefers the answer that people prefer, where both have a preference."
        yield Intervals("Agreement with people", _intervals(runs, agreeing), note)


def _intervals(runs: Sequence[RunContents], entries: list[tuple[int, str, Any]]) -> list[Interval]:
    return [
        Interval(label, "", rate["rate"], rate["low"], rate["high"], f"{rate['prompts']:,} prompts", colour)
        for label, colour, rate in shared_by_runs(runs, entries)
    ]


def _by_model(runs: Sequence[RunContents], judged: list[tuple[int, Any]]) -> Iterator[Table]:
    """What the sheet found, and how strong the models are, where there are more than two."""
    sheets = [(index, title_of(model), answers) for index, said in judged for model, answers in said["sheet"].items()]
    if sheets:
        questions = list(dict.fromkeys(question for _, _, answers in sheets for question in answers))
        rows = [
            TableRow(label, [_cell(answers.get(question)) for question in questions], colour)
            for label, colour, answers in shared_by_runs(runs, sheets)
        ]
        yield Table(["model", *questions], rows, "What people say of the answers, with 95 % intervals")
    strengths = [
        (index, title_of(model), found)
        for index, said in judged
        for model, found in (said["strengths"] if len(said["strengths"]) > 2 else {}).items()
    ]
    if strengths:
        rows = [TableRow(label, [_cell(found)], colour) for label, colour, found in shared_by_runs(runs, strengths)]
        yield Table(["model", "log odds against the first"], rows, "Bradley-Terry strengths, with 95 % intervals")


def _cell(found: Mapping[str, float] | None) -> str:
    """A share, a mean or a strength, with its interval."""
    if found is None:
        return ""
    show = percent if "rate" in found else number
    value = next(found[key] for key in ("rate", "mean", "strength") if key in found)
    return f"{show(value)} ({show(found['low'])} to {show(found['high'])})"
