"""Over-optimisation: how reward and true quality move with the distance from the SFT model (Gao et al.).

Gao, Schulman and Hilton, "Scaling laws for reward model overoptimization" (arXiv:2210.10760), find that under
reinforcement learning R(d) = d (alpha - beta log d) with d = sqrt(KL): quality rises by alpha at first, and falls for
the larger beta the sooner. The curves are the held-out evaluations that PPO logs, and both scores are taken relative to
the SFT model's, in standard deviations of its answers' scores.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..recipe.overrides import to_dict
from ..recipe.values import Recipe
from ..records.files import read_rows, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes


FORM = "R(d) = d (alpha - beta log d), d = sqrt(KL in nats)"
QUALITY = ("gold", "judge")  # what measures true quality, the better one first
JOINED = ("name", "seed", "tracker", "variants")  # settings in which runs may differ and share a line


@dataclass(frozen=True)
class RunCurve:
    """A run's held-out evaluations, in the order of its updates. The first is of the SFT model."""

    judge: str  # one of QUALITY
    steps: list[int]  # updates
    kl: list[float]  # nats a response, to the SFT model
    proxy: list[float]  # the reward that is trained against, relative to the SFT model's, in standard deviations
    quality: list[float]  # the judge's score, likewise
    ensemble_std: list[float] | None = None  # spread of an ensemble's members, in units of the reward

    @property
    def distance(self) -> list[float]:
        """sqrt(KL). What sampling makes of a KL of 0 may be a little below it."""
        return [math.sqrt(max(kl, 0.0)) for kl in self.kl]


@dataclass(frozen=True)
class Fit:
    """R(d) = d (alpha - beta log d), by least squares."""

    alpha: float
    beta: float
    r2: float  # share of the points' variance that the form explains

    def __call__(self, d: np.ndarray) -> np.ndarray:
        return d * (self.alpha - self.beta * np.log(d))

    @property
    def peak(self) -> float | None:
        """The d > 0 with the highest R, where dR/dd = alpha - beta log d - beta = 0; None where R only rises."""
        if self.beta <= 0 or self.alpha / self.beta > 100:  # or beyond any distance there is
            return None
        return math.exp(self.alpha / self.beta - 1)


@dataclass(frozen=True)
class FittedLine:
    """Runs with the same settings but for the seed, and what was fitted to all their points together."""

    label: str
    runs: list[str]
    proxy: Fit | None
    quality: Fit | None


@dataclass(frozen=True)
class FittedPanel:
    """Lines that differ in one setting."""

    title: str
    lines: list[FittedLine]


def read_curve(run_dir: Path) -> RunCurve | None:
    """The curve of a run's PPO; None unless it evaluated reward and quality from the SFT model on (eval_on_start)."""
    rows = {row["step"]: row for row in read_rows(run_dir / "metrics.jsonl") if {"eval_kl", "eval_score"} <= row.keys()}
    steps = sorted(rows)
    judge = next((name for name in QUALITY if steps and all(f"eval_{name}" in rows[step] for step in steps)), None)
    if judge is None or steps[0] != 0:
        return None
    samples = read_rows(run_dir / "samples.jsonl")
    start = [row for row in samples if (row["stage"], row["step"], row["model"]) == ("ppo", 0, "ppo")]

    def relative(name: str, key: str) -> list[float]:
        scale = float(np.std([row[key] for row in start])) or 1.0
        return [(rows[step][name] - rows[0][name]) / scale for step in steps]

    spread = "eval_ensemble_std"
    return RunCurve(
        judge,
        steps,
        [rows[step]["eval_kl"] for step in steps],
        relative("eval_score", "score"),
        relative(f"eval_{judge}", judge),
        [rows[step][spread] for step in steps] if spread in rows[0] else None,
    )


def fit_curve(distance: Sequence[float], score: Sequence[float]) -> Fit | None:
    """R(d) = d (alpha - beta log d) by least squares, linear in both; None with fewer than three points off d = 0.

    Args:
        distance: sqrt(KL) of each point.
        score: relative to the score at 0.
    """
    there = np.asarray(distance) > 0
    d, r = np.asarray(distance, float)[there], np.asarray(score, float)[there]
    if len(d) < 3:
        return None
    (alpha, beta), *_ = np.linalg.lstsq(np.stack([d, -d * np.log(d)], 1), r, rcond=None)
    left = Fit(float(alpha), float(beta), 0.0)(d) - r
    total = float(((r - r.mean()) ** 2).sum())
    return Fit(float(alpha), float(beta), 1 - float((left**2).sum()) / total if total else 1.0)


def panels(recipes: Mapping[str, Recipe], curves: Mapping[str, RunCurve]) -> list[FittedPanel]:
    """A panel for each setting that some runs differ in while they agree in all others, the seed aside.

    Runs that are in no such panel stand together in a last one.
    """
    flat = {name: dict(_flat(to_dict(recipe))) for name, recipe in recipes.items()}
    keys = list(dict.fromkeys(key for settings in flat.values() for key in settings))
    values = {name: {key: repr(settings.get(key)) for key in keys} for name, settings in flat.items()}
    varying = [key for key in keys if len({settings[key] for settings in values.values()}) > 1]
    result, placed = [], set()
    for key in varying:
        others = [other for other in varying if other != key]
        groups: defaultdict[tuple[str, ...], defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for name, settings in values.items():
            groups[tuple(settings[other] for other in others)][settings[key]].append(name)
        for fixed, lines in groups.items():
            if len(lines) > 1:
                where = ", ".join(f"{other}={value}" for other, value in zip(others, fixed, strict=True))
                ordered = sorted(lines.items(), key=lambda line: _by_value(line[0]))
                fitted = [_fitted_line(f"{key}={value}", runs, curves) for value, runs in ordered]
                result.append(FittedPanel(where, fitted))
                placed |= {run for runs in lines.values() for run in runs}
    rest: defaultdict[str, list[str]] = defaultdict(list)
    for name, settings in values.items():
        if name not in placed:
            rest[json.dumps(settings)].append(name)
    if rest:
        result.append(FittedPanel("", [_fitted_line(runs[0], runs, curves) for runs in rest.values()]))
    return result


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """`("ppo.kl_coef", 0.1)` for each setting of a recipe, without those that runs of one line may differ in."""
    pairs = []
    for key, value in settings.items():
        if prefix or key not in JOINED:
            name = f"{prefix}{key}"
            pairs += _flat(value, f"{name}.".replace(".args.", ".")) if isinstance(value, Mapping) else [(name, value)]
    return pairs


def _by_value(text: str) -> tuple[float, str]:
    """The key that sorts values as numbers, and behind them as texts those that are none."""
    try:
        return float(text), text
    except ValueError:
        return math.inf, text


def _fitted_line(label: str, runs: list[str], curves: Mapping[str, RunCurve]) -> FittedLine:
    distance = [d for run in runs for d in curves[run].distance]
    proxy, quality = ([r for run in runs for r in getattr(curves[run], name)] for name in ("proxy", "quality"))
    return FittedLine(label, runs, fit_curve(distance, proxy), fit_curve(distance, quality))


def write_for_sweep(recipes: Mapping[str, Recipe], run_dir: Path) -> Path | None:
    """Write the curves of a sweep's variants into its folder. Returns None where one of them has no curve."""
    curves = {name: curve for name in recipes if (curve := read_curve(run_dir / name)) is not None}
    return write_curves(recipes, curves, run_dir) if len(curves) == len(recipes) else None


def write_curves(recipes: Mapping[str, Recipe], curves: Mapping[str, RunCurve], folder: Path) -> Path:
    """Write `overoptimization.json`, `.svg` and `.png`: curves and fits by panel. Returns the path of the last.

    Args:
        recipes: of the runs, by name.
        curves: theirs, by the same names.
    """
    shown = panels(recipes, curves)
    judges = sorted({curve.judge for curve in curves.values()})
    write_json(
        folder / "overoptimization.json",
        {
            "form": FORM,
            "unit": "standard deviations of the SFT model's scores, above their mean",
            "quality": judges,
            "curves": {name: asdict(curve) for name, curve in curves.items()},
            "panels": [_panel_json(panel) for panel in shown],
        },
    )
    draw_curves(shown, curves, " or ".join(judges), folder)
    return folder / "overoptimization.png"


def _panel_json(panel: FittedPanel) -> dict[str, Any]:
    lines = [
        {"label": line.label, "runs": line.runs, "proxy": _fit_json(line.proxy), "quality": _fit_json(line.quality)}
        for line in panel.lines
    ]
    return {"title": panel.title, "lines": lines}


def _fit_json(fit: Fit | None) -> dict[str, float | None] | None:
    return None if fit is None else {**asdict(fit), "peak": fit.peak}


def draw_curves(shown: Sequence[FittedPanel], curves: Mapping[str, RunCurve], judge: str, folder: Path) -> None:
    """A figure with a panel each: quality (solid) and proxy (dashed) over sqrt(KL), as measured and as fitted."""
    from matplotlib import colormaps, rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    with rc_context({"font.size": 9, "svg.hashsalt": "rlhf_recipes"}):  # the same bytes for the same curves
        figure = Figure(figsize=(3.6 * len(shown), 3.4), layout="constrained")
        axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axis, panel in zip(axes, shown, strict=True):
            shades = colormaps["viridis"](np.linspace(0.0, 0.8, len(panel.lines)))
            for line, colour in zip(panel.lines, shades, strict=True):
                _draw_line(axis, line, curves, colour)
            axis.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)
            axis.set(xlabel="sqrt(KL to the SFT model), sqrt(nats)")
            axis.set_title(panel.title, fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(frameon=False, fontsize=8)
        axes[0].set_ylabel("score above the SFT model's, in its\nstandard deviations")
        styles = [Line2D([], [], color="#444444", linestyle=style) for style in ("-", "--")]
        figure.legend(styles, [f"{judge}: true quality", "proxy: the reward trained against"], loc="outside upper left",
                      ncols=2, frameon=False)  # fmt: skip
        figure.savefig(folder / "overoptimization.svg", metadata={"Date": None})
        figure.savefig(folder / "overoptimization.png", dpi=150)


def _draw_line(axis: "Axes", line: FittedLine, curves: Mapping[str, RunCurve], colour: Any) -> None:
    """The points of a line's runs, and the fits over their range with a mark where the quality's peaks."""
    furthest = max(d for run in line.runs for d in curves[run].distance)
    grid = np.linspace(0, furthest, 200)[1:]
    axis.plot([], [], color=colour, label=line.label)
    for name, style in (("quality", "-"), ("proxy", "--")):
        for run in line.runs:
            axis.plot(curves[run].distance, getattr(curves[run], name), ".", color=colour, markersize=3, alpha=0.5)
        fitted: Fit | None = getattr(line, name)
        if fitted is not None:
            axis.plot(grid, fitted(grid), style, color=colour, linewidth=1.4)
    best = line.quality and line.quality.peak
    if line.quality is not None and best is not None and best < furthest:
        axis.plot([best], line.quality(np.array([best])), "v", color=colour, markersize=6)
