"""Sections of curves: each stage's training, over-optimisation, time and memory."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ..recipe.values import STAGES
from ..records.contents import RewardCard
from . import charts, overoptimization
from .blocks import Grid, Interval, Intervals, Picture, Table, TableRow, Words, duration, memory, percent
from .charts import FAINT, Chart, Curve
from .gather import PartContents, RunContents, by_judge
from .shared import shared_by_runs


class MetricPanel(NamedTuple):
    """A chart of metrics: of each its key and its label. A held-out one is drawn with its points."""

    title: str
    unit: str
    keys: tuple[tuple[str, str], ...]


SFT_PANELS = (
    MetricPanel("Loss", "nats a token", (("loss", "training"), ("eval_loss", "held out"))),
    MetricPanel(
        "Token accuracy", "share", (("mean_token_accuracy", "training"), ("eval_mean_token_accuracy", "held out"))
    ),
)

REWARD_PANELS = (
    MetricPanel("Loss", "nats", (("loss", "training"), ("eval_loss", "held out"))),
    MetricPanel("Accuracy", "share", (("accuracy", "training"), ("eval_accuracy", "held out"))),
)

DPO_PANELS = (
    MetricPanel("Loss", "nats", (("loss", "training"), ("eval_loss", "held out"))),
    MetricPanel("Accuracy", "share", (("rewards/accuracies", "training"), ("eval_rewards/accuracies", "held out"))),
    MetricPanel("Margin", "reward", (("rewards/margins", "training"), ("eval_rewards/margins", "held out"))),
)

PPO_PANELS = (
    MetricPanel("Reward", "", (("objective/scores", "training"), ("eval_score", "held out"))),
    MetricPanel("Quality, held out", "", (("eval_gold", "gold"), ("eval_judge", "second reward model"))),
    MetricPanel("KL to the SFT model", "nats a response", (("objective/kl", "training"), ("eval_kl", "held out"))),
    MetricPanel("Entropy", "nats a token", (("policy/entropy_avg", "training"),)),
    MetricPanel("Length", "tokens", (("response_length", "training"), ("eval_response_length", "held out"))),
    MetricPanel("Cut off before the end", "share", (("without_eos", "training"), ("eval_without_eos", "held out"))),
    MetricPanel("Clipped", "share", (("policy/clipfrac_avg", "policy"), ("val/clipfrac_avg", "critic"))),
    MetricPanel("Variance that the critic explains", "share", (("val/explained_variance", "training"),)),
    MetricPanel("Ratio of new to old probability", "", (("val/ratio", "training"),)),
    MetricPanel("Policy loss", "", (("loss/policy_avg", "training"),)),
    MetricPanel("Value loss", "", (("loss/value_avg", "training"),)),
    MetricPanel("Loss on pretraining texts", "nats a token", (("loss/ptx_avg", "training"),)),
    MetricPanel("Perplexity of held-out texts", "", (("eval_perplexity", "held out"),)),
    MetricPanel("Spread of the ensemble", "", (("eval_ensemble_std", "held out"),)),
)


def _drawn(
    runs: Sequence[RunContents],
    panels: Iterable[MetricPanel],
    series: Callable[[RunContents, str], tuple[list[float], list[float]]],
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


def _grid(drawn: Iterable[Chart | None], runs: Sequence[RunContents]) -> Iterator[Grid]:
    """The charts that there are, under one legend of the runs where there are several."""
    shown = [chart for chart in drawn if chart is not None]
    if shown:
        yield Grid(shown, [(run.name, index, "solid") for index, run in enumerate(runs)] if len(runs) > 1 else [])


def sft_curves(runs: Sequence[RunContents]) -> Iterator[Any]:
    """SFT: its curves, and its loss and accuracy on held-out demonstrations."""
    entries = [
        (index, "SFT", [f"{results['heldout_loss']:.3f}", percent(results["heldout_token_accuracy"])])
        for index, run in enumerate(runs)
        if (results := run.manifest.results("sft"))
    ]
    rows = [TableRow(label, cells, colour) for label, colour, cells in shared_by_runs(runs, entries)]
    yield from _grid(_drawn(runs, SFT_PANELS, lambda run, key: run.parts[0].series("sft", key), "step"), runs)
    if rows:
        yield Table(["", "held-out loss, nats a token", "held-out token accuracy"], rows)


def dpo_curves(runs: Sequence[RunContents]) -> Iterator[Any]:
    """DPO: its curves."""
    yield from _grid(_drawn(runs, DPO_PANELS, lambda run, key: run.parts[0].series("dpo", key), "step"), runs)


def ppo_curves(runs: Sequence[RunContents]) -> Iterator[Any]:
    """PPO: its curves over the updates of all rounds."""
    marks = [start for run in runs for start in run.starts()[1:]] if len(runs) == 1 else []
    if marks:
        yield Words(
            "At a dotted line a round begins, with a reward model of its own: rewards of two rounds do not compare."
        )
    yield from _grid(_drawn(runs, PPO_PANELS, lambda run, key: run.ppo(key), "update", marks), runs)
    entries = [
        (index, "PPO", [f"{max(first):.2g}", f"{noise[0]:.2g}" if (noise := run.ppo("val/batching_noise")[1]) else ""])
        for index, run in enumerate(runs)
        if (first := run.ppo("val/first_pass_log_ratio_max")[1])
    ]
    if entries:
        columns = ["", "largest log-ratio of a token before an update's first step; 0 is exact"]
        columns.append("noise of later passes: standard deviation of a token's log-ratio, nats")
        rows = [TableRow(label, cells, colour) for label, colour, cells in shared_by_runs(runs, entries)]
        yield Table(columns, rows, "Rounding")


def first_curves(runs: Sequence[RunContents], stage: str) -> Iterator[Grid]:
    """The first three charts of a stage, which say most of it; of the reward stage in the round under way."""
    panels = {"sft": SFT_PANELS, "reward": REWARD_PANELS, "ppo": PPO_PANELS, "dpo": DPO_PANELS}[stage][:3]
    if stage == "ppo":
        drawn = _drawn(runs, panels, lambda run, key: run.ppo(key), "update")
    else:
        drawn = _drawn(runs, panels, lambda run, key: run.parts[-1].series(stage, key), "step")
    yield from _grid(drawn, runs)


def reward_curves(runs: Sequence[RunContents]) -> Iterator[Any]:
    """Reward models: their curves, and what their cards say of calibration, accuracy and length."""
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


def _adapters(run: RunContents) -> list[Chart]:
    """The curves of all reward adapters of a run: of each round, and of each member of an ensemble."""
    curves: list[tuple[PartContents, str, str]] = []
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


def _accuracies(runs: Sequence[RunContents], cards: list[tuple[int, PartContents, RewardCard]]) -> Intervals:
    """Shares of held-out pairs that the reward models rank right, of all pairs and of each source of them."""
    entries = []
    for index, part, card in cards:
        results = part.manifest.results("reward")
        members = results.get("members_accuracy", ())
        details = [f"members {', '.join(map(percent, members))}"] if len(members) > 1 else []
        details += [f"the judge {percent(results['judge_accuracy'])}"] if "judge_accuracy" in results else []
        detail = "; ".join(details)
        later = f", round {part.number}" if len(runs[index].parts) > 1 else ""
        entries.append((index, f"all pairs{later}", (card["accuracy"], detail)))
        if part is runs[index].parts[-1]:
            entries += [(index, f"from {source}", (rate, "")) for source, rate in card["by_source"].items()]
            entries.append((index, "the longer response wins", (card["length"]["longer_wins"], "as a rule of its own")))
            if "tokens_win" in card:
                entries.append((index, "the words alone", (card["tokens_win"], "by a logistic regression")))
    rows = [
        Interval(label, detail, rate["rate"], rate["low"], rate["high"], f"{rate['pairs']:,} pairs", colour)
        for label, colour, (rate, detail) in shared_by_runs(runs, entries)
    ]
    return Intervals("Accuracy on held-out comparisons", rows)


def _by_length(card: RewardCard, runs: str) -> Table:
    """A card's accuracy by the difference in length. `runs` names those that have it, and is empty for all."""
    rows = [
        TableRow(
            f"{row['shortest']} to {row['longest']}".replace("-", "\N{MINUS SIGN}"),
            [f"{row['accuracy']['pairs']:,}", percent(row["accuracy"]["rate"]), percent(row["longer_wins"]["rate"])],
        )
        for row in card["by_length"]
    ]
    columns = ["chosen is longer by, tokens", "pairs", "accuracy", "longer wins"]
    return Table(columns, rows, f"{runs}By length")


def over_optimisation(runs: Sequence[RunContents]) -> Iterator[Any]:
    """Reward and quality over the distance from the SFT model (Gao et al., arXiv:2210.10760)."""
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
            for key, curves in (("eval_score", proxy), (judge[0] if judge else "", quality)):
                if rows and all(key in row for row in rows):
                    curves.append(Curve(name, distance, [row[key] for row in rows], shade, "points", steps))
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
    # A sweep writes its figure beside its variants' folders.
    figures = dict.fromkeys(run.folder.parent / "overoptimization.svg" for run in runs) if len(runs) > 1 else {}
    for path in filter(Path.is_file, figures):
        yield Picture(f"Relative to the SFT model, with the fits of {overoptimization.FORM}", path.read_bytes())


PHASES = {
    "generate": "sampling responses",
    "score": "scoring them, log-probabilities, values",
    "update_policy": "training the policy",
    "update_critic": "training the critic",
    "evaluate": "evaluating",
}


def resources(runs: Sequence[RunContents]) -> Iterator[Any]:
    """Time and peak memory of each stage, and what PPO spent its time on."""
    entries = []
    for index, run in enumerate(runs):
        records = [
            (part.label(stage), part.manifest.stages[stage], part.series(stage, "memory/peak_mib")[1])
            for part in run.parts
            for stage in STAGES
            if stage in part.manifest.stages
        ]
        total = sum(record["seconds"] for _, record, _ in records) or 1
        for label, record, logged in records:
            # The manifest has time and peak of an attempt when that has ended.
            cells = [duration(record["seconds"]) if record["seconds"] else "", memory(record.get("planned_peak_mib"))]
            cells.append(memory(record["peak_memory_mib"] or max(logged, default=None)))
            entries.append((index, label, (cells, record["seconds"] / total)))
    if entries:
        rows = [
            TableRow(label, cells, colour, share) for label, colour, (cells, share) in shared_by_runs(runs, entries)
        ]
        yield Table(["stage", "time", "planned peak memory", "measured peak memory"], rows)
    phases = [_phases(run) for run in runs]
    if any(phases):
        rows = []
        for words in dict.fromkeys(chain.from_iterable(phases)):
            shares = [seconds[words] / sum(seconds.values()) if words in seconds else math.nan for seconds in phases]
            cells = [
                f"{duration(seconds[words])}, {percent(share, 0)}" if words in seconds else ""
                for seconds, share in zip(phases, shares, strict=True)
            ]
            rows.append(TableRow(words, cells, None, shares[0] if len(runs) == 1 else None))
        columns = [run.name for run in runs] if len(runs) > 1 else ["time"]
        yield Table(["doing", *columns], rows, "What PPO spent its time on")


def _phases(run: RunContents) -> dict[str, float]:
    """The seconds of PPO's phases over all updates and rounds; the rest is loading, saving and comparing at the end."""
    total = sum(part.manifest.stages["ppo"]["seconds"] for part in run.parts if "ppo" in part.manifest.stages)
    seconds = {
        words: sum(chain.from_iterable(part.series("ppo", f"time/{phase}")[1] for part in run.parts))
        for phase, words in PHASES.items()
    }
    seconds = {words: value for words, value in seconds.items() if value > 0}
    rest = total - sum(seconds.values())
    return seconds | ({"loading, saving, comparing the models at the end": rest} if seconds and rest > 0 else {})
