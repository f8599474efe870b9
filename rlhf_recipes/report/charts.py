"""Charts as inline SVG. matplotlib draws them; the page's style sheet gives colours and letters, in light and dark."""

import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

from ..records.contents import Calibration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


POINTS = 500  # of a curve at most

WIDTH, HEIGHT = 290, 170  # in the units of the SVG, which are about CSS pixels, three in a row or one on a phone

COLOURS = 8  # of the style sheet, --c0 to --c7
LETTERS = 11  # pixels, as in the style sheet

# What matplotlib draws with, and the variable of the style sheet that takes its place.
DIM, RULE = "#000002", "#000003"

VARIABLES = {DIM: "var(--dim)", RULE: "var(--line)"}

VARIABLES |= {f"#0001{number:02x}": f"var(--c{number})" for number in range(COLOURS)}

FAINT = -1  # of a legend: of no curve in particular
STEPS = [1, 2, 2.5, 5, 10]  # between ticks, times a power of ten
DASHES = {"solid": "-", "dashed": (0, (5, 2)), "dotted": (0, (1, 2))}

DRAWN: dict[Any, Any] = {
    "svg.fonttype": "none",  # letters stay letters
    "font.size": LETTERS,
    "axes.edgecolor": RULE,
    "axes.labelcolor": DIM,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": DIM,
    "ytick.labelcolor": DIM,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "ytick.major.size": 0,
    "axes.unicode_minus": True,
}


@dataclass(frozen=True)
class Curve:
    """Values over steps, or over another quantity. A gap is a NaN."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    style: str = "solid"  # of DASHES, "points" for a line with its points marked, "dots" for points alone
    numbers: Sequence[str] = ()  # what is written at the points, where they are few


@dataclass(frozen=True)
class Chart:
    """A drawn chart with its heading, its legend of (label, colour, style), and a note under it."""

    title: str
    unit: str
    svg: Markup
    legend: tuple[tuple[str, int, str], ...]
    note: str = ""


def lines(
    title: str,
    curves: Iterable[Curve],
    unit: str = "",
    x_label: str = "update",
    marks: Sequence[float] = (),
    legend: tuple[tuple[str, int, str], ...] | None = None,
) -> Chart | None:
    """A chart of curves. None where no curve has a point.

    Args:
        unit: of y; "share" is drawn in percent.
        marks: values of x at which a vertical line stands.
        legend: of each sort of line its label, colour and style; None: of each curve. Its description names all anyway.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    drawn = [curve for curve in map(_finite, curves) if any(map(math.isfinite, curve.y))]
    if not drawn:
        return None
    axes, figure = _axes(x_label)
    for x in filter(math.isfinite, marks):
        axes.axvline(x, color=DIM, linewidth=0.8, linestyle=DASHES["dotted"])
    together = 1
    for curve in drawn:
        together = max(together, _draw(axes, curve))
    _number(axes, drawn)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, min_n_ticks=3, steps=STEPS))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=x_label in ("update", "step"), steps=STEPS))
    places = {x for curve in drawn for x in curve.x if math.isfinite(x)}
    if len(places) == 1:
        axes.set_xticks(list(places))
    if unit == "share":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _percent(value)))
    shown = tuple((curve.label, curve.colour, curve.style) for curve in drawn) if legend is None else legend
    steps = f"{x_label}s" if x_label in ("update", "step") else "updates"
    note = f"A point is the mean of {together} {steps}, a band their range." if together > 1 else ""
    return Chart(title, "" if unit == "share" else unit, _inline(figure, _said(title, unit, drawn)), shown, note)


def reliability(cards: Sequence[tuple[str, int, Calibration]]) -> Chart:
    """The reliability plot of reward cards.

    Args:
        cards: of each what its label begins with, its colour, and its `calibration`.
    """
    from matplotlib.ticker import PercentFormatter

    axes, figure = _axes("predicted probability")
    axes.plot([0, 1], [0, 1], color=DIM, linewidth=0.8, linestyle=DASHES["dashed"])
    curves = []
    for name, colour, calibration in cards:
        bins = calibration["bins"]
        x, y = ([row[key] for row in bins] for key in ("predicted", "observed"))
        most = max(row["pairs"] for row in bins)
        axes.plot(x, y, color=_colour(colour))
        axes.scatter(x, y, s=[100 * row["pairs"] / most for row in bins], color=_colour(colour), alpha=0.6, zorder=3)
        label = f"{name}calibration error {calibration['expected_calibration_error']:.3f}"
        curves.append(Curve(label, x, y, colour))
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    legend = tuple((curve.label, curve.colour, "solid") for curve in curves)
    note = "On the dashed line, what it says is how often it is right. A larger point is of more pairs."
    return Chart("Reliability", "share chosen", _inline(figure, _said("Reliability", "share", curves)), legend, note)


def _percent(value: float) -> str:
    return f"{round(100 * value, 6):g}%".replace("-", "\N{MINUS SIGN}")


def _colour(number: int) -> str:
    return f"#0001{number % COLOURS:02x}"


def variable(number: int) -> str:
    """A colour as the style sheet has it, in an attribute of SVG."""
    return VARIABLES[DIM if number == FAINT else _colour(number)]


def _axes(x_label: str) -> tuple["Axes", "Figure"]:
    """Axes with room for the labels; matplotlib's own layout would take most of the time."""
    # matplotlib takes half a second to import. The Figure alone draws with no display, and touches no global state.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(DRAWN):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        left, bottom = 44, 36
        place = (left / WIDTH, bottom / HEIGHT, (WIDTH - left - 12) / WIDTH, (HEIGHT - bottom - 8) / HEIGHT)
        axes = figure.add_axes(place)
        axes.grid(axis="y", color=RULE, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.set_xlabel(x_label, labelpad=3)
    return axes, figure


def _draw(axes: "Axes", curve: Curve) -> int:
    """Draw a curve of at most POINTS points. Returns how many of its values became one."""
    colour, together = _colour(curve.colour), math.ceil(len(curve.x) / POINTS)
    if together > 1:
        parts = [slice(start, start + together) for start in range(0, len(curve.x), together)]
        x, low, y, high = zip(*(_pooled(curve.x[part], curve.y[part]) for part in parts), strict=True)
        if list(x) == sorted(x):
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    else:
        x, y = curve.x, curve.y
    if curve.style == "dots":
        axes.plot(x, y, color=colour, linestyle="", marker="o", markersize=3.5, alpha=0.55, markeredgewidth=0)
        return together
    marked = curve.style == "points" or sum(map(math.isfinite, y)) == 1
    dash = DASHES.get(curve.style, "-")
    axes.plot(x, y, color=colour, linestyle=dash, linewidth=1.6, marker="o" if marked else None, markersize=4.5)
    return together


def _number(axes: "Axes", curves: Iterable[Curve]) -> None:
    """Write the numbers at the points, the last first, and none where another one stands."""
    taken: list[tuple[float, float]] = []
    for curve in curves:
        for text, x, y in list(zip(curve.numbers, curve.x, curve.y, strict=False))[::-1]:
            across, up = axes.transData.transform((x, y))
            if math.isfinite(y) and all(abs(across - a) > 2 * LETTERS or abs(up - b) > LETTERS for a, b in taken):
                taken.append((across, up))
                axes.annotate(
                    text, (x, y), (-4, 4), textcoords="offset points", ha="right", color=_colour(curve.colour)
                )


def _pooled(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float, float]:
    """The mean of x, and the least, mean and greatest of the finite y."""
    values = [value for value in y if math.isfinite(value)] or [math.nan]
    return sum(x) / len(x), min(values), sum(values) / len(values), max(values)


def _finite(curve: Curve) -> Curve:
    """The curve with a gap for what is no number: matplotlib cannot scale infinity."""
    y = [b if math.isfinite(a) and math.isfinite(b) else math.nan for a, b in zip(curve.x, curve.y, strict=True)]
    x = [value if math.isfinite(value) else math.nan for value in curve.x]
    return Curve(curve.label, x, y, curve.colour, curve.style, curve.numbers)


def _said(title: str, unit: str, curves: Sequence[Curve]) -> str:
    """The chart in words, for whoever cannot see it."""
    parts = []
    for curve in curves:
        finite = [value for value in curve.y if math.isfinite(value)]
        first, last, low, high = (f"{value:.3g}" for value in (finite[0], finite[-1], min(finite), max(finite)))
        parts.append(f"{curve.label}: from {first} to {last}, between {low} and {high}")
    return f"{title}{f', {unit}' if unit else ''}. {'; '.join(parts)}."


def _inline(figure: "Figure", description: str) -> Markup:
    """The figure as an SVG element whose colours are variables of the page's style sheet.

    `style` attributes become attributes of SVG: the page's policy runs no style but its own sheet.
    """
    from matplotlib import rc_context

    stream = io.StringIO()
    # The salt keeps the ids of two charts apart.
    with rc_context({**DRAWN, "svg.hashsalt": description}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(stream.getvalue())
    for parent in list(root.iter()):
        parent.tag = parent.tag.rpartition("}")[2]
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    used = set(re.findall(r"#([\w.]+)", stream.getvalue()))
    for element in root.iter():
        element.attrib = _attributes(element.attrib, used)
        element.text, element.tail = (element.text or "").strip() or None, None
    box = root.attrib["viewBox"]
    root.attrib = {"viewBox": box, "role": "img"}
    title = ElementTree.Element("title")
    title.text = description
    root.insert(0, title)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _attributes(old: dict[str, str], used: set[str]) -> dict[str, str]:
    """An element's attributes without XML's namespaces, without styles of letters and without ids that nothing uses."""
    new = {name.rpartition("}")[2]: value for name, value in old.items()}
    declarations = (part.partition(":") for part in new.pop("style", "").split(";") if part.strip())
    new |= {name.strip(): value.strip() for name, _, value in declarations}
    for name in ("font", "font-size", "font-family"):
        new.pop(name, None)
    if new.get("id") not in used:
        new.pop("id", None)
    new = {name: VARIABLES.get(value, value) for name, value in new.items()}
    if "d" in new:
        new["d"] = re.sub(r"(\.\d{2})\d+", r"\1", " ".join(new["d"].split()))
    return new
