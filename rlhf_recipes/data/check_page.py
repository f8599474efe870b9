"""What `rlhf-recipes check` prints. Nothing that a source holds can do anything to the terminal."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text as Line

from ..records.terminal import printable
from .check import QUANTILES
from .sources import SOURCES


def escape(text: str, longest: int = 600) -> str:
    """A text that can do nothing to a terminal: control characters are escaped, the middle of a long one is cut out.

    `longest` counts the characters that stay of a long one, before they are escaped.
    """
    if len(text) > longest:
        half = longest // 2
        text = f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
    return printable(text)


def lines(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The report of `check.examine` in words, without lengths and first rows: headings, and what to say under each."""
    others = [stage for stage in report["stages"] if stage != report["stage"]]
    yield "stage", report["stage"] + (f" ({', '.join(others)} can take it too)" if others else "")
    if report["named"]:
        yield "source", "{data}; licence: {licence}; {cite}".format(**report["named"])
    if report["convert"]:
        yield "conversion", report["convert"]
    yield "format", " + ".join(report["format"]) + (", of messages" if report["conversational"] else ", of text")
    if report["columns"]:
        yield "columns", ", ".join(f"{ours} from {theirs}" for ours, theirs in report["columns"].items())
    used = [report["columns"].get(column, column) for column in (*report["format"], *report["also_used"])]
    unused = [column for column in report["found"] if column not in used and not report["convert"]]
    if report["also_used"]:
        yield "also used", ", ".join(report["also_used"])
    if unused:
        yield "not used", ", ".join(unused)
    yield "rows", f"{report['rows']:,}; usable: {report['used']:,}, of {report['prompts']:,} prompts"
    if report["drawn"]:
        of, by, parts = (report["drawn"][key] for key in ("of", "by", "parts"))
        shares = "; ".join(f"{name} {part['drawn']:.1%} ({part['whole']:.1%})" for name, part in parts.items())
        yield "drawn", f"{report['rows']:,} of {of:,} rows, drawn by a hash of the prompt"
        yield f"by {by}", f"{shares} (in brackets: of the whole)"
    if report["stage"] not in ("rank", "label"):
        heldout = f"held out to evaluate on: {report['heldout']:,}, of {report['heldout_prompts']:,} prompts"
        yield "split", f"to train on: {report['train']:,}; {heldout}"
        kinds = "prompts that are not trained on, but begin one that is or go on from one"
        yield "straddling", f"{kinds}: {report['straddling']:,}"
    if report.get("steps") is not None:
        yield "steps", f"{report['steps']:,}, of PPO updates" if report["stage"] == "ppo" else f"{report['steps']:,}"
    if report["read_whole"]:
        yield "memory", report["read_whole"]
    yield from _comparisons(report)
    if report["special_tokens"]["rows"]:
        special = report["special_tokens"]
        rows = ", ".join(map(str, special["examples"]))
        yield (
            "special tokens",
            f"rows whose own text spells one, which the model gets: {special['rows']:,} (rows {rows})",
        )
    if "other" in report:
        other = report["other"]
        both = f"{other['prompts_in_both']:,}, in {other['rows_here']:,} rows here{_examples(other, 'there')}"
        yield "in both", f"prompts that the {other['rows']:,} rows of {other['source']} have as well: {both}"
    if report["unit"] == "characters":
        yield "too long", "not known: without --model lengths are in characters, and no chat template is applied"
    elif report["max_length"] is not None:
        count = report["dropped"].get("too long", 0)
        yield "too long", f"rows of more than {report['max_length']:,} tokens, which are dropped and not cut: {count:,}"
    refused = sum(report["dropped"].values())
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in report["dropped"].items())
    yield "refused", f"{refused:,} rows ({refused / report['rows']:.2%})" + (f": {reasons}" if reasons else "")


def _comparisons(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What rows say of each other, and responses of each other."""
    duplicates = report["duplicates"]
    yield "duplicates", f"rows that repeat an earlier one: {duplicates['rows']:,}{_examples(duplicates)}"
    if report["pairs"]:
        longer, shorter, same = (report["pairs"].get(name, 0) for name in ("longer", "shorter", "same"))
        share = f"{longer / (longer + shorter):.1%} of {longer + shorter:,} pairs" if longer + shorter else "no pair"
        yield "longer wins", f"{share} of different length in {report['unit']} ({same:,} of the same)"
        if report["opposed"]:
            longest, shortest = report["opposed"]
            ours, theirs = f"in {longest['rate']:.0%}", f"in {shortest['source']} in {shortest['rate']:.0%}"
            better = f"in {longest['source']} the longer response is better {ours}, {theirs}"
            yield "sources differ", f"{better}. A small model may learn nothing from both at once: try each alone"
        twice = report["contradictions"]
        several = f"of {twice['repeated_pairs']:,} that are judged several times"
        yield "contradictions", f"pairs that are judged both ways: {twice['pairs']:,} {several}{_examples(twice)}"


def _examples(part: dict[str, Any], there: str = "") -> str:
    """The pairs of row numbers that a part of the report names; `there` says where the second of each pair is."""
    pairs = ", ".join(f"{first} and {second} {there}".rstrip() for first, second in part["examples"])
    return f" (rows {pairs})" if pairs else ""


def show_check(report: dict[str, Any], console: Console) -> None:
    """Print the report of `check.examine`."""
    console.print(Line(escape(report["source"]), style="bold"))
    for heading, said in lines(report):
        console.print(Line(f"  {heading:<15}", style="bold"), Line(escape(said, 2000)), sep="", soft_wrap=True)
    for line in report["examples"]:
        console.print(Line(f"    {escape(line)}"), soft_wrap=True)
    if report["lengths"]:
        console.print(_lengths_table(report))
    for row in report["first"]:
        console.print(Line(f"row {row['row']}", style="bold"))
        for name, part in row["parts"].items():
            line = Line(f"  {name} ({part['length']:,} {report['unit']})  ", style="bold")
            text = Line(escape(part["text"]))
            text.highlight_words(report["special_tokens"].get("shown", ()), "reverse")
            console.print(line, text, sep="", soft_wrap=True)
    for problem in report["problems"]:
        line = escape(f"The stage will refuse this source. {problem}", 2000)
        console.print(Line(line, style="bold red"), soft_wrap=True)


def _lengths_table(report: dict[str, Any]) -> Table:
    """Quantiles of the lengths of prompts, completions and both."""
    table = Table(title=f"length in {report['unit']}", title_justify="left")
    names = ["shortest", *QUANTILES, "longest", "mean"]
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for part, quantiles in report["lengths"].items():
        part = {"whole": "prompt and longest completion"}.get(part, part)
        table.add_row(part, *(f"{quantiles[name]:,}" for name in names))
    return table


def show_sources(console: Console) -> None:
    """Print the named sources with what they are for, and under which licence."""
    for name, named in SOURCES.items():
        where = f"{named.data}, {named.subset + ', ' if named.subset else ''}{named.split}"
        console.print(Line(name, style="bold"), Line(f"for {', '.join(named.stages)}; licence: {named.licence}"))
        console.print(Line(f"  {named.about}\n  {where}; {named.citation}"), soft_wrap=True)
