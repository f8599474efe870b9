"""A run, small: how far it is, the first curves of the stage under way, and its last answers. Without a script."""

from collections.abc import Iterator, Sequence
from typing import Any

from .blocks import Section, Table, TableRow
from .curves import first_curves
from .gather import TITLES, RunContents, prompts_of, title_of
from .page import render

ANSWERS, LETTERS = 3, 160  # of the last model so many, each so long at most


def render_cell(runs: Sequence[RunContents]) -> str:
    """The HTML page of runs for a cell of a notebook."""
    return render(runs, cell=list(_sections(runs)))


def _sections(runs: Sequence[RunContents]) -> Iterator[Section]:
    begun = [stage for run in runs for part in run.parts for stage in part.manifest.stages]
    if begun and (curves := list(first_curves(runs, begun[-1]))):
        yield Section(begun[-1], TITLES[begun[-1]], curves)
    tables = [table for run in runs for table in _last_answers(run)]
    if tables:
        yield Section("answers", "Answers", tables)


def _last_answers(run: RunContents) -> Iterator[Table]:
    """The first prompts with the answers of all models so far."""
    answers: dict[Any, dict[str, str]] = {}
    for (prompt, _), row in prompts_of(run.answers):
        answers.setdefault(prompt, {})[row["model"]] = _text(row["completion"])
        answers[prompt]["prompt"] = _text(row["prompt"])
    models = list(dict.fromkeys(row["model"] for row in run.answers))
    rows = [TableRow(said["prompt"], [said.get(model, "") for model in models]) for said in answers.values()]
    if rows:
        yield Table([run.name, *map(title_of, models)], rows[:ANSWERS])


def _text(said: Any) -> str:
    """Text or messages as text, cut where it is long."""
    text = said if isinstance(said, str) else "\n".join(message["content"] for message in said)
    return text if len(text) <= LETTERS else f"{text[:LETTERS]}…"
