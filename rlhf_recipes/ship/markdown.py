"""Blocks of the report, and texts of anybody's, as Markdown in which they can be no markup and name no folder."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..report.blocks import Code, Intervals, Table, Words, percent

MARKUP = re.compile(r"([\\`*_\[\]<>|&~$])")
# An absolute path's folders, in front of its last part; no part of a URL, of a relative path or of "and/or".
FOLDERS = re.compile(r"""(?:file://|(?<![\w/.~-]))~?/(?!/)(?:[^\s/'"`|<>()\[\],;]+/)*(?=[^\s/])""")


def without_folders(text: str) -> str:
    """The text with files of this machine by their names alone, or by what leads to them from where one works."""
    for folder in (Path.cwd(), Path.home()):
        text = text.replace(f"{folder}/", "") if folder.name else text  # all but the root
    return FOLDERS.sub("", text)


def plain(text: str) -> str:
    """The text on one line, for Markdown and HTML to take as it is."""
    return MARKUP.sub(r"\\\1", " ".join(without_folders(text).split()))


def fenced(text: str, language: str = "text") -> str:
    """The text as a block of code, which nothing in it can end. What is said of folders is up to the caller."""
    lines = text.encode(errors="replace").decode().splitlines()
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return "\n".join([f"{ticks}{language}", *lines, ticks])


def table(columns: list[str], rows: list[list[str]], numeric: Collection[int] = ()) -> str:
    """A table.

    Args:
        numeric: the columns that stand on the right.
    """
    rules = ["---:" if number in numeric else "---" for number in range(len(columns))]
    lines = [[plain(cell) for cell in line] for line in (columns, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rules, *lines[1:]))


def markdown(block: Any) -> str:
    """A block of the report; nothing of charts and pictures, which are the page's, or of a table without rows."""
    match block:
        case Words():
            return plain(block.text)
        case Code():
            return fenced(without_folders(block.text), "bash")
        case Table() if block.rows:
            text = table(block.columns, [[row.label, *row.cells] for row in block.rows], block.numeric)
            if block.folded:
                return f"<details><summary>{plain(block.title)}</summary>\n\n{text}\n\n</details>"
            return f"**{plain(block.title)}**\n\n{text}" if block.title else text
        case Intervals() if block.rows:
            rows = [
                [row.label, percent(row.rate), f"{percent(row.low)} to {percent(row.high)}", row.count, row.detail]
                for row in block.rows
            ]
            text = table(["", "share", "95 % interval", "of", ""], rows, {1})
            note = f"\n\n{plain(block.note)}" if block.note else ""
            return f"**{plain(block.title)}**\n\n{text}{note}"
    return ""
