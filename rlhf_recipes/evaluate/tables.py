"""The tables of an evaluation, of RewardBench and of comparisons, for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..recipe.values import PEOPLE
from ..records.terminal import printable
from .verdict import Result, percent

PANEL = {  # of what `behaviour_panel` says: heading and format
    "tokens": ("tokens", "{:.1f}"),
    "without_eos": ("no\nEOS", "{:.0%}"),
    "distinct_1": ("dist-1", "{:.2f}"),
    "distinct_2": ("dist-2", "{:.2f}"),
    "repetition": ("rep-4", "{:.1%}"),
    "refusals": ("refu-\nsals", "{:.0%}"),
    "sycophancy": ("syco-\nphancy", "{:.0%}"),
    "self_similarity": ("alike", "{:.2f}"),
    "base_perplexity": ("base\nppl", "{:.1f}"),
    "about_prompt": ("about\nprompt", "{:.0%}"),
    "kl": ("KL", "{:.2f}"),
    "kl_per_token": ("KL a\ntoken", "{:.3f}"),
}


def evaluation_tables(result: Result) -> list[Table]:
    """The tables of an evaluation: wins, what people say, behaviour and, where it was measured, the alignment tax."""
    behaviour = {
        name: {
            heading: form.format(entry["behaviour"][key])
            for key, (heading, form) in PANEL.items()
            if key in entry["behaviour"]
        }
        for name, entry in result["models"].items()
    }
    tax = {name: _tax_cells(entry) for name, entry in result["models"].items()}
    tables = [_win_table(result), *_people_tables(result.get("people")), _table_by_model("Behaviour", behaviour)]
    return [*tables, _table_by_model("Alignment tax", tax)] if any(tax.values()) else tables


def rewardbench_table(result: Result) -> Table:
    """What RewardBench's subsets and sections come to, and their mean, a column a judge."""
    version = "" if result["version"] == 1 else f" {result['version']}"
    table = _table("", title=f"RewardBench{version}, {result['rows']:,} questions")
    table.add_column("questions", justify="right")
    for judge in result["judges"]:
        table.add_column(Text(printable(f"{judge} (95 %)")), justify="right", overflow="fold")
    judges = list(result["judges"].values())
    for part in ("subsets", "sections", "mean"):
        for name, rate in judges[0][part].items():
            cells = [percent(judge[part][name]) for judge in judges]
            table.add_row(Text(printable(name)), f"{rate['prompts']:,}", *cells)
        table.add_section()
    return table


def comparisons_table(result: Result) -> Table:
    """How many pairs are ranked right, by source and by length, and by rules that read no sense, a column a judge."""
    judges = result["judges"]
    table = _table("", title=f"Right on comparisons, {result['rows']:,} rows")
    table.add_column("pairs", justify="right")
    for judge in judges:
        table.add_column(Text(printable(f"{judge} (95 %)")), justify="right", overflow="fold")
    first, *_ = judges.values()

    def add(name: str, shares: list[Any]) -> None:
        table.add_row(Text(printable(name)), f"{shares[0]['pairs']:,}", *map(percent, shares))

    add("all", [found["accuracy"] for found in judges.values()])
    for source in first["by_source"]:
        add(source, [found["by_source"][source] for found in judges.values()])
    for place, part in enumerate(first["by_length"]):
        shares = [found["by_length"][place]["accuracy"] for found in judges.values()]
        add(f"chosen longer by {part['shortest']} to {part['longest']} tokens", shares)
    table.add_section()
    table.add_row(Text("the longer one wins"), "", percent(first["length"]["longer_wins"]))
    table.add_row(Text("the words alone"), "", percent(first["tokens_win"]))
    correlations = [found["length"]["correlation"] for found in judges.values()]
    cells = ["" if value is None else f"{value:.2f}" for value in correlations]
    table.add_row(Text("score and length, correlation"), "", *cells)
    errors = [found["calibration"]["expected_calibration_error"] for found in judges.values()]
    table.add_row(Text("calibration error"), "", *(f"{error:.3f}" for error in errors))
    return table


def _table(*names: str, title: str) -> Table:
    """An empty table, as narrow as can be, whose first columns are names. None of its cells is ever cut."""
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=0)
    for name in names:
        table.add_column(name, overflow="fold")
    return table


def _win_table(result: Result) -> Table:
    """A row for each model, what it is compared with, and each judge."""
    sole = result["against"][0] if len(result["against"]) == 1 else None
    title = f"Wins {'' if sole is None else f'against {printable(sole)} '}on {result['prompts']:,} prompts"
    names = ("model", "judge") if sole else ("model", "against", "judge")
    table = _table(*names, title=title)
    for heading in ("wins (95 %)", "at equal\nlengths (95 %)", "ties", "mean\nscore", "its"):
        table.add_column(heading, justify="right", overflow="fold")
    judge = None
    for win in sorted(result["wins"], key=lambda win: list(result["judges"]).index(win["judge"])):
        if win["judge"] != judge and judge is not None:
            table.add_section()
        judge = win["judge"]
        means = [result["models"][win[side]]["means"].get(judge) for side in ("model", "against")]
        cells = [percent(win), percent(win["length_controlled"]), f"{win['ties']:.0%}"]
        cells += ["" if mean is None else f"{mean:.2f}" for mean in means]
        table.add_row(*(Text(printable(win[key])) for key in names), *cells)
    return table


def _people_tables(people: Mapping[str, Any] | None) -> list[Table]:
    """What people say: each of them, on each model, and how far other judges agree with them."""
    if people is None:
        return []
    tables = []
    if len(people["people"]) > 1:
        by_person = _table("model", "against", "person", title="Wins by person")
        by_person.add_column("wins (95 %)", justify="right")
        for row in people["by_person"]:
            names = [Text(printable(row[key])) for key in ("model", "against", "person")]
            by_person.add_row(*names, percent(row))
        tables.append(by_person)
    if people["sheet"]:
        sheet = _table("", title="What people say of the answers (95 %)")
        for model in people["sheet"]:
            sheet.add_column(Text(printable(model)), justify="right", overflow="fold")
        for question in next(iter(people["sheet"].values())):
            found = [answers.get(question) for answers in people["sheet"].values()]
            sheet.add_row(Text(printable(question)), *map(_answer_cell, found))
        tables.append(sheet)
    if len(people["strengths"]) > 2:
        against = next(iter(people["strengths"]))
        strengths = _table("model", title=f"Bradley-Terry strength, log odds against {printable(against)}")
        strengths.add_column("(95 %)", justify="right")
        for model, found in people["strengths"].items():
            strengths.add_row(Text(printable(model)), "0" if model == against else _answer_cell(found))
        tables.append(strengths)
    agreement = _table("judge", title="Prefers the answer that people prefer")
    agreement.add_column("(95 %)", justify="right")
    agreement.add_column("prompts", justify="right")
    for judge, rate in people["agreement"].items():
        name = "people, each other" if judge == PEOPLE else judge
        agreement.add_row(Text(printable(name)), percent(rate), f"{rate['prompts']:,}")
    return [*tables, agreement] if people["agreement"] else tables


def _answer_cell(found: Mapping[str, float] | None) -> str:
    """A share, or a mean of a scale or a strength, with its interval."""
    if found is None:
        return ""
    if "rate" in found:
        return percent(found)
    value = found.get("mean", found.get("strength", 0.0))
    return f"{value:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def _tax_cells(entry: Mapping[str, Any]) -> dict[str, str]:
    """What a model's entry says of perplexity and tasks: heading -> cell."""
    cells = {"perplexity": f"{entry['perplexity']:.2f}"} if "perplexity" in entry else {}
    for task, metrics in entry.get("tasks", {}).items():
        for name, metric in metrics.items():
            error = "" if metric["error"] is None else f" ± {metric['error']:.3f}"
            cells[f"{task}\n{name}"] = f"{metric['value']:.3f}{error}"
    return cells


def _table_by_model(title: str, cells: Mapping[str, Mapping[str, str]]) -> Table:
    """A row a model, from its cells by heading. A column that no model has a value for is left out."""
    headings = list(dict.fromkeys(heading for row in cells.values() for heading in row))
    table = _table("model", title=title)
    for heading in headings:
        table.add_column(Text(printable(heading, keep="\n")), justify="right", overflow="fold")
    for name, row in cells.items():
        table.add_row(Text(printable(name)), *(row.get(heading, "") for heading in headings))
    return table
