"""Sections of curves: each stage's training, over-optimisation, time and memory."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ..recipe.values import STAGES
from . import charts, overoptimization
from .blocks import Grid, Interval, Intervals, Line, Picture, Table, Words, duration, memory, percent
from .charts import FAINT, Chart, Curve
from .gather import Part, Run
from .results import by_judge
from .shared import shared_by_runs


class Panel(NamedTuple):
    """A chart of metrics: of each its key and its label. A held-out one is drawn with its points."""

    title: str
    unit: str
    keys: tuple[tuple[str, str], ...]


SFT_PANELS = (
    Panel("Loss", "nats a token", (("loss", "training"), ("eval_loss", "held out"))),
    Panel("Token accuracy", "share", (("mean_token_accuracy", "training"), ("eval_mean_token_accuracy", "held out"))),
)

REWARD_PANELS = (
    Panel("Loss", "nats", (("loss", "training"), ("eval_loss", "held out"))),
    Panel("Accuracy", "share", (("accuracy", "training"), ("eval_accuracy", "held out"))),
)

DPO_PANELS = (
    Panel("Loss", "nats", (("loss", "training"), ("eval_loss", "held out"))),
    Panel("Accuracy", "share", (("rewards/accuracies", "training"), ("eval_rewards/accuracies", "held out"))),
    Panel("Margin", "reward", (("rewards/margins", "training"), ("eval_rewards/margins", "held out"))),
)

PPO_PANELS = (
    Panel("Reward", "", (("objective/scores", "training"), ("eval_score", "held out"))),
    Panel("Quality, held out", "", (("eval_gold", "gold"), ("eval_judge", "second reward model"))),
    Panel("KL to the SFT model", "nats a response", (("objective/kl", "training"), ("eval_kl", "held out"))),
    Panel("Entropy", "nats a token", (("policy/entropy_avg", "training"),)),
    Panel("Length", "tokens", (("response_length", "training"), ("eval_response_length", "held out"))),
    Panel("Cut off before the end", "share", (("without_eos", "training"), ("eval_without_eos", "held out"))),
    Panel("Clipped", "share", (("policy/clipfrac_avg", "policy"), ("val/clipfrac_avg", "critic"))),
    Panel("Variance that the critic explains", "share", (("val/explained_variance", "training"),)),
    Panel("Ratio of new to old probability", "", (("val/ratio", "training"),)),
    Panel("Policy loss", "", (("loss/policy_avg", "training"),)),
    Panel("Value loss", "", (("loss/value_avg", "training"),)),
    Panel("Loss on pretraining texts", "nats a token", (("loss/ptx_avg", "training"),)),
    Panel("Perplexity of held-out texts", "", (("eval_perplexity", "held out"),)),
    Panel("Spread of the ensemble", "", (("eval_ensemble_std", "held out"),)),
)


def _drawn(
    runs: Sequence[Run],
    panels: Iterable[Panel],
    series: Callable[[Run, str], tuple[list[float], list[float]]],
    x_label: str,
    marks: Sequence[float] = (),
) -> list[Chart]:
    """The panels of one run, with a colour a metric, or of several, with a colour a run. None without any curve."""
    drawn = []
    for panel in panels:
        curves, said = [], {}
        for index, run in enumerate(runs):
            for which, (key, label) in enumerate(panel.keys):
                x, y = series(run, key)
                if x:
                    style = "points" if key.startswith("eval_") else "dashed" if which and len(runs) > 1 else "solid"
                    name, colour = (label, which) if len(runs) == 1 else (f"{run.name}, {label}", index)
                    curves.append(Curve(name, x, y, colour, style))
                    said[label] = (label, which if len(runs) == 1 else FAINT, style)
        obvious = len(said) == 1 and next(iter(said)) in ("training", "held out")
        legend = () if obvious else tuple(said.values())
        drawn.append(charts.lines(panel.title, curves, panel.unit, x_label, marks, legend))
    return [chart for chart in drawn if chart is not None]


def _grid(drawn: Iterable[Chart | None], runs: Sequence[Run]) -> Iterator[Grid]:
    """The charts that there are, under one legend of the runs where there are several."""
    shown = [chart for chart in drawn if chart is not None]
    if shown:
        yield Grid(shown, [(run.name, index, "solid") for index, run in enumerate(runs)] if len(runs) > 1 else [])


def sft_curves(runs: Sequence[Run]) -> Iterator[Any]:
    found = [
        (index, "SFT", [f"{results['heldout_loss']:.3f}", percent(results["heldout_token_accuracy"])])
        for index, run in enumerate(runs)
        if (results := run.stage("sft").get("results"))
    ]
    rows = [Line(label, cells, colour) for label, colour, cells in shared_by_runs(runs, found)]
    yield from _grid(_drawn(runs, SFT_PANELS, lambda run, key: run.parts[0].series("sft", key), "step"), runs)
    if rows:
        yield Table(["", "held-out loss, nats a token", "held-out token accuracy"], rows)


def dpo_curves(runs: Sequence[Run]) -> Iterator[Any]:
    yield from _grid(_drawn(runs, DPO_PANELS, lambda run, key: run.parts[0].series("dpo", key), "step"), runs)


def ppo_curves(runs: Sequence[Run]) -> Iterator[Any]:
    marks = [start for run in runs for start in run.starts()[1:]] if len(runs) == 1 else []
    if marks:
        yield Words(
            "At a dotted line a round begins, with a reward model of its own: rewards of two rounds do not compare."
        )
    yield from _grid(_drawn(runs, PPO_PANELS, lambda run, key: run.ppo(key), "update", marks), runs)


def reward_curves(runs: Sequence[Run]) -> Iterator[Any]:
    if len(runs) == 1:
        drawn = _adapters(runs[0])
    else:
        drawn = _drawn(runs, REWARD_PANELS, lambda run, key: run.parts[0].series("reward", key), "step")
    cards = [
        (index, part, card)
        for index, run in enumerate(runs)
        for part in run.parts
        if (card := run.card(part)) is not None
    ]
    last = shared_by_runs(runs, {index: (index, "", card) for index, _, card in cards}.values())  # of the last round
    if last:
        drawn.append(charts.reliability([(label, colour or 0, card["calibration"]) for label, colour, card in last]))
    yield from _grid(drawn, runs)
    if cards:
        yield _accuracies(runs, cards)
    for label, _, card in last:
        yield _by_length(card, label)


def _adapters(run: Run) -> list[Chart]:
    """The curves of all reward adapters of a run: of each round, and of each member of an ensemble."""
    curves: list[tuple[Part, str, str]] = []
    for part in run.parts:
        stages = dict.fromkeys(row["stage"] for row in part.metrics if row["stage"].startswith("reward"))
        for stage in stages:
            which = stage.removeprefix("reward").removeprefix("-") or "0"
            words = [f"round {part.number}"] * (len(run.parts) > 1)
            words += [f"member {which}" if which.isdigit() else which] * (len(stages) > 1)
            curves.append((part, stage, ", ".join(words)))
    drawn = []
    for panel in REWARD_PANELS:
        lines = []
        for index, (part, stage, name) in enumerate(curves):
            for which, (key, label) in enumerate(panel.keys):
                x, y = part.series(stage, key)
                if x:
                    colour = which if len(curves) == 1 else index
                    lines.append(Curve(f"{name}, {label}" if name else label, x, y, colour, ("solid", "points")[which]))
        drawn.append(charts.lines(panel.title, lines, panel.unit, "step"))
    return [chart for chart in drawn if chart is not None]


def _accuracies(runs: Sequence[Run], cards: list[tuple[int, Part, dict[str, Any]]]) -> Intervals:
    found = []
    for index, part, card in cards:
        results = part.manifest["stages"]["reward"]["results"]
        members = results.get("members_accuracy", ())
        details = [f"members {', '.join(map(percent, members))}"] if len(members) > 1 else []
        details += [f"the judge {percent(results['judge_accuracy'])}"] if "judge_accuracy" in results else []
        detail = "; ".join(details)
        round_of = f", round {part.number}" if len(runs[index].parts) > 1 else ""
        found.append((index, f"all pairs{round_of}", (card["accuracy"], detail)))
        if part is runs[index].parts[-1]:
            found += [(index, f"from {source}", (of, "")) for source, of in card["by_source"].items()]
            found.append((index, "the longer response wins", (card["length"]["longer_wins"], "as a rule of its own")))
    rows = [
        Interval(label, detail, of["rate"], of["low"], of["high"], f"{of['pairs']:,} pairs", colour)
        for label, colour, (of, detail) in shared_by_runs(runs, found)
    ]
    return Intervals("Accuracy on held-out comparisons", rows)


def _by_length(card: dict[str, Any], runs: str) -> Table:
    """Of the runs whose names are given, or of all."""
    rows = [
        Line(
            f"{row['shortest']} to {row['longest']}".replace("-", "\N{MINUS SIGN}"),
            [f"{row['accuracy']['pairs']:,}", percent(row["accuracy"]["rate"]), percent(row["longer_wins"]["rate"])],
        )
        for row in card["by_length"]
    ]
    columns = ["chosen is longer by, tokens", "pairs", "accuracy", "longer wins"]
    return Table(columns, rows, f"{runs}By length")


def over_optimisation(runs: Sequence[Run]) -> Iterator[Any]:
    colour = {run.name: index for index, run in enumerate(runs)}
    proxy, quality, frontier, judges = [], [], [], set()
    for run in runs:
        judge = run.quality()
        for part, start in zip(run.parts, run.starts(), strict=True):
            name = run.name if len(runs) > 1 else f"round {part.number}" if len(run.parts) > 1 else "PPO"
            shade = colour[run.name] if len(runs) > 1 else part.number - 1
            rows = part.rows("ppo", "eval_kl")
            steps = [f"{start + row['step']:.0f}" for row in rows] if len(rows) <= 8 and len(runs) == 1 else []
            distance = [math.sqrt(max(row["eval_kl"], 0)) for row in rows]
            for key, of in (("eval_score", proxy), (judge[0] if judge else "", quality)):
                if rows and all(key in row for row in rows):
                    of.append(Curve(name, distance, [row[key] for row in rows], shade, "points", steps))
            if judge:
                judges.add(by_judge(judge[1]))
            kl, scores = part.series("ppo", "objective/kl")[1], part.series("ppo", "objective/scores")[1]
            if len(kl) == len(scores) > 1:
                frontier.append(Curve(name, kl, scores, shade, "dots"))
    legend = None if len(runs) == 1 and len(runs[0].parts) > 1 else ()
    drawn = [
        charts.lines("Reward, held out", proxy, "", "square root of KL", legend=legend),
        charts.lines(
            f"Quality by {', '.join(sorted(judges))}, held out", quality, "", "square root of KL", legend=legend
        ),
        charts.lines("Reward in training", frontier, "", "KL, nats a response", legend=legend),
    ]
    if any(drawn):
        words = "What the policy gained for how far it went from the SFT model."
        if quality:
            words += " Where the reward, which PPO trains against, goes on rising and quality falls, it is being gamed."
        yield Words(f"{words} Numbers at points are updates." if any(curve.numbers for curve in proxy) else words)
    yield from _grid(drawn, runs)
    of_sweeps = dict.fromkeys(run.folder.parent / "overoptimization.svg" for run in runs) if len(runs) > 1 else {}
    for path in filter(Path.is_file, of_sweeps):
        yield Picture(f"Relative to the SFT model, with the fits of {overoptimization.FORM}", path.read_bytes())


PHASES = {
    "generate": "sampling responses",
    "score": "scoring them, log-probabilities, values",
    "update_policy": "training the policy",
    "update_critic": "training the critic",
    "evaluate": "evaluating",
}


def resources(runs: Sequence[Run]) -> Iterator[Any]:
    found = []
    for index, run in enumerate(runs):
        records = [
            (part.label(stage), part.manifest["stages"][stage])
            for part in run.parts
            for stage in STAGES
            if stage in part.manifest["stages"]
        ]
        whole = sum(record["seconds"] for _, record in records) or 1
        for label, record in records:
            cells = [duration(record["seconds"]), memory(record.get("planned_peak_mib"))]
            cells.append(memory(record["peak_memory_mib"]))
            found.append((index, label, (cells, record["seconds"] / whole)))
    if found:
        rows = [Line(label, cells, colour, share) for label, colour, (cells, share) in shared_by_runs(runs, found)]
        yield Table(["stage", "time", "planned peak memory", "measured peak memory"], rows)
    phases = [_phases(run) for run in runs]
    if any(phases):
        rows = []
        for words in dict.fromkeys(chain.from_iterable(phases)):
            shares = [of[words] / sum(of.values()) if words in of else math.nan for of in phases]
            cells = [
                f"{duration(of[words])}, {percent(share, 0)}" if words in of else ""
                for of, share in zip(phases, shares, strict=True)
            ]
            rows.append(Line(words, cells, None, shares[0] if len(runs) == 1 else None))
        columns = [run.name for run in runs] if len(runs) > 1 else ["time"]
        yield Table(["doing", *columns], rows, "What PPO spent its time on")


def _phases(run: Run) -> dict[str, float]:
    """The seconds of PPO's phases over all updates and rounds; the rest is loading, saving and comparing at the end."""
    whole = sum(part.manifest["stages"].get("ppo", {}).get("seconds", 0) for part in run.parts)
    seconds = {
        words: sum(chain.from_iterable(part.series("ppo", f"time/{phase}")[1] for part in run.parts))
        for phase, words in PHASES.items()
    }
    seconds = {words: value for words, value in seconds.items() if value > 0}
    rest = max(whole - sum(seconds.values()), 0.0)
    return seconds | {"loading, saving, comparing the models at the end": rest} if seconds else {}
