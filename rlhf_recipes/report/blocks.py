"""What a section of the page is made of, and how numbers are written in it."""

import base64
import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from .charts import Chart


@dataclass(frozen=True)
class Words:
    """A paragraph."""

    text: str
    kind: ClassVar = "words"


@dataclass(frozen=True)
class Code:
    """A command or a piece of code, to be copied."""

    text: str
    kind: ClassVar = "code"


class TableRow(NamedTuple):
    """A row of a table."""

    label: str
    cells: list[str]
    colour: int | None = None
    share: float | None = None  # a bar behind the first cell


@dataclass(frozen=True)
class Table:
    """A table whose first column holds the rows' labels."""

    columns: list[str]  # the first is that of the labels
    rows: list[TableRow]
    title: str = ""
    folded: bool = False
    kind: ClassVar = "table"

    @property
    def numeric(self) -> set[int]:
        """The columns of numbers, which stand on the right."""
        numeric = set()
        for column in range(1, len(self.columns)):
            cells = [row.cells[column - 1] for row in self.rows if row.cells[column - 1]]
            if cells and all(re.match("[\\d\N{MINUS SIGN}]", cell) for cell in cells):
                numeric.add(column)
        return numeric


@dataclass(frozen=True)
class Grid:
    """Charts side by side, under one legend."""

    charts: list[Chart]
    legend: list[tuple[str, int, str]]  # of all of them: label, colour, style
    kind: ClassVar = "grid"


@dataclass(frozen=True)
class Picture:
    """An SVG file that something else has drawn."""

    title: str
    svg: bytes
    kind: ClassVar = "picture"

    @property
    def link(self) -> str:
        """The picture itself, as what a page can show: an image, in which no script runs."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg).decode()}"


class Interval(NamedTuple):
    """A share with its 95 % interval."""

    label: str
    detail: str
    rate: float
    low: float
    high: float
    count: str
    colour: int | None = None


@dataclass(frozen=True)
class Intervals:
    """Shares with their intervals, drawn below each other on one scale."""

    title: str
    rows: list[Interval]
    note: str = ""
    kind: ClassVar = "intervals"


@dataclass(frozen=True)
class Answers:
    """The models' answers side by side, one prompt shown at a time."""

    data: dict[str, Any]  # as `results.answers` makes it and `page.js` reads it
    kind: ClassVar = "answers"


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading, which the contents link to."""

    id: str
    title: str
    blocks: list[Any]


def number(value: Any) -> str:
    """Three digits that count, never as a power of ten; nothing where there is no number."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return ""
    digits = 2 if abs(value) < 1 else max(0, 2 - int(math.log10(abs(value))))
    return f"{value:,.{digits}f}".replace("-", "\N{MINUS SIGN}")


def percent(value: Any, digits: int = 1) -> str:
    """A share in percent; nothing where there is no number."""
    return f"{value:.{digits}%}" if isinstance(value, int | float) and math.isfinite(value) else ""


def duration(seconds: float) -> str:
    """Seconds as hours, minutes or seconds."""
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.1f} min" if minutes >= 1 else f"{seconds:.1f} s"


def memory(mib: Any) -> str:
    """MiB as GiB or MiB; nothing where there is no number."""
    if not isinstance(mib, int | float):
        return ""
    return f"{mib / 1024:,.1f} GiB" if mib >= 1024 else f"{mib:,.0f} MiB"
