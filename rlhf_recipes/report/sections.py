"""The sections of the page: what each says of one run, or of several side by side."""

import json
import math
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ..evaluate import overoptimization
from ..recipe import SECTIONS, STAGES, Recipe, load, names, parse_overrides, replace, settings
from . import charts
from .blocks import (
    Answers,
    Code,
    Grid,
    Interval,
    Intervals,
    Line,
    Picture,
    Section,
    Table,
    Words,
    duration,
    memory,
    number,
    percent,
)
from .charts import FAINT, Chart, Curve
from .gather import NAMES, Part, Row, Run, best_win, models, prompts_of, title_of, trust, wins

ANSWERS = 1_500_000  # characters of answers in the page at most


def sections(runs: Sequence[Run]) -> list[Section]:
    """All sections that have something to show."""
    made: list[tuple[str, str, Callable[[Sequence[Run]], Iterator[Any]]]] = [
        ("what", "What was run", what_was_run),
        ("results", "Results", results),
        ("answers", "Answers side by side", answers),
        ("sft", "Supervised fine-tuning", sft),
        ("reward", "Reward model", reward),
        ("ppo", "PPO", ppo),
        ("dpo", "DPO", dpo),
        ("overoptimisation", "Reward, quality and KL", over_optimisation),
        ("resources", "Time and memory", resources),
    ]
    found = [Section(id, title, list(of(runs))) for id, title, of in made]
    return [section for section in found if section.blocks]


# --- Words that several sections have ---


def shared(runs: Sequence[Run], found: Iterable[tuple[int, str, Any]]) -> list[tuple[str, int | None, Any]]:
    """What several runs have alike, once: with the names of those runs before its label, unless all have it.

    Args:
        found: the number of a run, a label, and what the run has under it.
    Returns:
        label, colour (that of the first of those runs; None where all have it) and what they have, in the order found.
    """
    groups: list[tuple[str, Any, list[int]]] = []
    for index, label, value in found:
        same = next((group for group in groups if group[:2] == (label, value) and index not in group[2]), None)
        if same is None:
            groups.append((label, value, [index]))
        else:
            same[2].append(index)
    return [
        (label, None, value)
        if len(having) == len(runs)
        else (f"{', '.join(runs[index].name for index in having)}: {label}", having[0], value)
        for label, value, having in groups
    ]


def by_judge(judge: str) -> str:
    return NAMES.get(judge, judge)


def verdict(run: Run) -> tuple[str, str]:
    """The number that says most of a run, and what it says."""
    win = best_win(run)
    if win is not None:
        words = (
            f"{title_of(win['model'])} wins against {title_of(win['against'])} on {win['rate']:.1%} of "
            f"{win['prompts']:,} held-out prompts (95 % interval {win['low']:.1%} to {win['high']:.1%}, ties count "
            f"half), judged by {by_judge(win['judge'])}."
        )
        only = " No judge of its own is known, so it may only have learned to please that one."
        return percent(win["rate"]), words + (only if trust(win["judge"]) == trust("reward") else "")
    accuracy, loss = run.summary["reward_model_accuracy"], run.summary["sft_heldout_loss"]
    if accuracy is not None:
        return percent(
            accuracy
        ), f"The reward model prefers the chosen response in {accuracy:.1%} of the held-out pairs."
    if loss is not None:
        return f"{loss:.3f}", f"The SFT model's loss on held-out demonstrations is {loss:.3f} nats a token."
    return "", "No stage is finished yet."


# --- What was run -----------------------------------------------------------------------------------------------------


def what_was_run(runs: Sequence[Run]) -> Iterator[Any]:
    if len(runs) == 1:
        yield from _how(runs[0])
        yield _data(runs)
        yield _versions(runs)
        lines = [line.partition("=") for line in settings(runs[0].recipe)]
        rows = [Line(key, [value]) for key, _, value in lines]
        yield Table(["setting", "value"], rows, f"All {len(rows)} settings", folded=True)
        return
    rows = [Line(run.name, [_command(run), _where(run)], index) for index, run in enumerate(runs)]
    yield Table(["run", "command", "folder"], rows)
    lines = _settings(runs)
    keys = dict.fromkeys(chain.from_iterable(lines))
    differ = [key for key in keys if len({of.get(key) for of in lines}) > 1 and key != "name"]
    if differ:
        rows = [Line(key, [of.get(key, "") for of in lines]) for key in differ]
        yield Table(["setting", *(run.name for run in runs)], rows, "Where their settings differ")
    else:
        yield Words("Their settings are the same.")
    yield _data(runs)
    yield _versions(runs)


def _settings(runs: Sequence[Run]) -> list[dict[str, str]]:
    """The settings of each run; of a section that not all have, only whether it is there."""
    lines = [dict(line.split("=", 1) for line in settings(run.recipe)) for run in runs]
    for section in SECTIONS:
        if any(section in of for of in lines):
            lines = [{key: value for key, value in of.items() if not key.startswith(f"{section}.")} for of in lines]
            for of in lines:
                of.setdefault(section, "set")
    return lines


def _how(run: Run) -> Iterator[Any]:
    yield Words(f"To run it again, in a folder of its own (in {_where(run)} it would skip what is finished):")
    yield Code(_command(run))


def _command(run: Run) -> str:
    """The command that runs it again: a shipped recipe with what was changed of it, else the run's `recipe.json`."""
    where = _where(run)
    again = f"{where}-again"
    name = run.recipe.name.replace("_", "-")
    changed = _changes(run.recipe, load(name)) if name in names() else None
    if changed is not None:
        return " ".join(["rlhf-recipes run", name, *map(_quoted, changed), "--run-dir", _quoted(again)])
    code = "from pathlib import Path; from rlhf_recipes import run; from rlhf_recipes.recipe import of_run; "
    return f"python -c {_quoted(f'{code}run(of_run(Path({where!r})), Path({again!r}))')}"


def _where(run: Run) -> str:
    """The run's folder as one would type it here."""
    return str(run.folder.relative_to(Path.cwd()) if run.folder.is_relative_to(Path.cwd()) else run.folder)


def _quoted(word: str) -> str:
    """The word for a shell, with double quotes around single ones where that is simpler to read."""
    return f'"{word}"' if "'" in word and not re.search(r'["$`\\!]', word) else shlex.quote(word)


def _changes(recipe: Recipe, shipped: Recipe) -> list[str] | None:
    """The settings that make the shipped recipe this one; None where no settings do."""
    known = set(settings(shipped))
    changed = [_bare(line) for line in settings(recipe) if line not in known]
    try:
        again = replace(shipped, **parse_overrides(changed))
    except ValueError:  # a section as a whole, or a key of another version
        return None
    same = json.dumps(vars(again), default=vars) == json.dumps(vars(recipe), default=vars)
    return changed if same else None


def _bare(line: str) -> str:
    """`tracker=none` for `tracker='none'`, where a field knows the bare word."""
    bare = re.sub(r"='(\w+)'$", r"=\1", line)
    return bare if parse_overrides([bare]) == parse_overrides([line]) else line


def _data(runs: Sequence[Run]) -> Table:
    found = []
    for index, run in enumerate(runs):
        for part in run.parts:
            for stage, record in part.manifest["stages"].items():
                data = record["data"]
                dropped = ", ".join(f"{count:,} {reason}" for reason, count in data["dropped"].items()) or "none"
                counts = [f"{data[key]:,}" for key in ("rows", "train", "heldout")]
                found.append((index, part.label(stage), [*counts, dropped, data["source"]]))
    rows = [Line(label, cells, colour) for label, colour, cells in shared(runs, found)]
    return Table(["stage", "rows", "trained on", "held out", "dropped", "data"], rows, "Data")


def _versions(runs: Sequence[Run]) -> Table:
    """Base, seed and versions of all runs, in a column each."""
    facts = []
    for run in runs:
        base = run.manifest.get("base", {})
        known = {f"base {key}": str(value) for key, value in base.items() if value is not None}
        facts.append({"seed": str(run.recipe.seed), **known, **run.manifest.get("versions", {})})
    rows = [Line(key, [of.get(key, "") for of in facts]) for key in dict.fromkeys(chain.from_iterable(facts))]
    columns = ["", *(run.name for run in runs)] if len(runs) > 1 else ["", "value"]
    return Table(columns, rows, "Base, seed and versions", folded=True)


# --- Curves -----------------------------------------------------------------------------------------------------------


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


def sft(runs: Sequence[Run]) -> Iterator[Any]:
    found = [
        (index, "SFT", [f"{results['heldout_loss']:.3f}", percent(results["heldout_token_accuracy"])])
        for index, run in enumerate(runs)
        if (results := run.stage("sft").get("results"))
    ]
    rows = [Line(label, cells, colour) for label, colour, cells in shared(runs, found)]
    yield from _grid(_drawn(runs, SFT_PANELS, lambda run, key: run.parts[0].series("sft", key), "step"), runs)
    if rows:
        yield Table(["", "held-out loss, nats a token", "held-out token accuracy"], rows)


def dpo(runs: Sequence[Run]) -> Iterator[Any]:
    yield from _grid(_drawn(runs, DPO_PANELS, lambda run, key: run.parts[0].series("dpo", key), "step"), runs)


def ppo(runs: Sequence[Run]) -> Iterator[Any]:
    marks = [start for run in runs for start in run.starts()[1:]] if len(runs) == 1 else []
    if marks:
        yield Words(
            "At a dotted line a round begins, with a reward model of its own: rewards of two rounds do not compare."
        )
    yield from _grid(_drawn(runs, PPO_PANELS, lambda run, key: run.ppo(key), "update", marks), runs)


# --- The reward model -------------------------------------------------------------------------------------------------


def reward(runs: Sequence[Run]) -> Iterator[Any]:
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
    last = shared(runs, {index: (index, "", card) for index, _, card in cards}.values())  # of the last round
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
        for label, colour, (of, detail) in shared(runs, found)
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


# --- Over-optimisation ------------------------------------------------------------------------------------------------


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


# --- Results ----------------------------------------------------------------------------------------------------------

BEHAVIOUR: dict[str, tuple[str, Callable[[Any], str]]] = {
    "tokens": ("tokens", number),
    "without_eos": ("cut off", percent),
    "distinct_1": ("distinct words", percent),
    "distinct_2": ("distinct pairs", percent),
    "repetition": ("repetition", percent),
    "self_similarity": ("alike", percent),
    "refusals": ("refusals", percent),
    "sycophancy": ("sycophancy", percent),
    "kl": ("KL, nats", number),
    "kl_per_token": ("KL a token", number),
}


def results(runs: Sequence[Run]) -> Iterator[Any]:
    found = []
    for index, run in enumerate(runs):
        for win in wins(run):
            detail = f"judged by {by_judge(win['judge'])}"
            at = win.get("length_controlled")
            if at:
                detail += f"; at equal length {at['rate']:.1%} ({at['low']:.1%} to {at['high']:.1%})"
            if "ties" in win:
                detail += f"; {win['ties']:.0%} ties"
            found.append((index, f"{title_of(win['model'])} against {title_of(win['against'])}", (win, detail)))
    found.sort(key=lambda one: trust(one[2][0]["judge"]))  # so that the same judge's stand together
    rows = [
        Interval(label, detail, win["rate"], win["low"], win["high"], f"{win['prompts']:,} prompts", colour)
        for label, colour, (win, detail) in shared(runs, found)
    ]
    if rows:
        note = "Share of the held-out prompts on which the first one wins, with its 95 % interval. A tie counts half."
        yield Intervals("Wins", rows, note)
    best = [(index, of["words"], "") for index, run in enumerate(runs) if (of := (run.evaluation or {}).get("best"))]
    yield from (Words(words) for words, _, _ in shared(runs, best))
    compared = [
        (index, title_of(name), (name, of)) for index, run in enumerate(runs) for name, of in models(run).items()
    ]
    if compared:
        yield _means(shared(runs, compared))
        yield from _tasks(shared(runs, compared))


def _means(found: list[tuple[str, int | None, Any]]) -> Table:
    judges = dict.fromkeys(judge for _, _, (_, of) in found for judge in of.get("means", {}))
    shown = [key for key in BEHAVIOUR if any(key in of.get("behaviour", {}) for _, _, (_, of) in found)]
    rows = []
    for label, colour, (name, of) in found:
        # What the base and the SFT model have of KL says nothing about training against the penalty.
        behaviour = {k: v for k, v in of.get("behaviour", {}).items() if name not in ("base", "sft") or "kl" not in k}
        cells = [number(of.get("means", {}).get(judge)) for judge in judges]
        rows.append(Line(label, cells + [BEHAVIOUR[key][1](behaviour.get(key)) for key in shown], colour))
    return Table(["model", *judges, *(BEHAVIOUR[key][0] for key in shown)], rows, "Means on held-out prompts")


def _tasks(found: list[tuple[str, int | None, Any]]) -> Iterator[Table]:
    """What alignment cost elsewhere: perplexity and tasks."""
    tasks = dict.fromkeys(
        (task, metric) for _, _, (_, of) in found for task, metrics in of.get("tasks", {}).items() for metric in metrics
    )
    has_perplexity = any("perplexity" in of for _, _, (_, of) in found)
    if not tasks and not has_perplexity:
        return
    rows = []
    for label, colour, (_, of) in found:
        cells = [number(of.get("perplexity"))] if has_perplexity else []
        for task, metric in tasks:
            one = of.get("tasks", {}).get(task, {}).get(metric, {})
            error = one.get("error")
            cells.append(f"{number(one.get('value'))}{f' ± {number(error)}' if error is not None else ''}")
        rows.append(Line(label, cells, colour))
    columns = ["model", *["perplexity"] * has_perplexity, *(f"{task}, {metric}" for task, metric in tasks)]
    yield Table(columns, rows, "What it cost elsewhere")


def answers(runs: Sequence[Run]) -> Iterator[Any]:
    """The same prompts answered by all models. Answers that runs share, as those of one SFT model, are there once."""
    found = []
    for index, run in enumerate(runs):
        of_run: dict[str, dict[tuple[str, int], Row]] = {}
        for key, row in prompts_of(run.answers):
            of_run.setdefault(row["model"], {})[key] = _shown(row)
        found += [(index, title_of(model), rows) for model, rows in of_run.items()]
    columns = {label: rows for label, _, rows in shared(runs, found)}
    keys = sorted(
        dict.fromkeys(chain.from_iterable(columns.values())), key=lambda key: -sum(key in of for of in columns.values())
    )
    shown, size = [], 0
    for key in keys:
        row = {"prompt": json.loads(key[0]), "answers": [of.get(key) for of in columns.values()]}
        size += len(json.dumps(row))
        if shown and size > ANSWERS:
            break
        shown.append(row)
    if shown:
        known = {judge for row in shown for one in row["answers"] if one for judge in one["scores"]}
        judges = sorted(known, key=lambda judge: (trust(judge), judge))
        yield Answers({"models": list(columns), "judges": judges, "rows": shown, "prompts": len(keys)})


def _shown(row: Row) -> Row:
    """An answer as the page's script takes it: what is no number would be no JSON."""
    scores = {k: v for k, v in row.get("scores", {}).items() if isinstance(v, int | float) and math.isfinite(v)}
    kept = {"text": row["completion"], "tokens": row["tokens"], "ended": row["ended"]}
    kl = row.get("kl")
    return kept | {"scores": scores} | ({"kl": kl} if kl is not None and math.isfinite(kl) else {})


# --- Time and memory --------------------------------------------------------------------------------------------------

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
        rows = [Line(label, cells, colour, share) for label, colour, (cells, share) in shared(runs, found)]
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
