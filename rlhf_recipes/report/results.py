"""Sections of results: win rates, means, tasks, and the models' answers side by side."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

from .blocks import Answers, Interval, Intervals, Line, Table, Words, number, percent
from .gather import NAMES, Row, Run, best_win, models, prompts_of, title_of, trust, wins
from .shared import shared_by_runs

ANSWERS = 1_500_000  # characters of answers in the page at most


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
        for label, colour, (win, detail) in shared_by_runs(runs, found)
    ]
    if rows:
        note = "Share of the held-out prompts on which the first one wins, with its 95 % interval. A tie counts half."
        yield Intervals("Wins", rows, note)
    best = [(index, of["words"], "") for index, run in enumerate(runs) if (of := (run.evaluation or {}).get("best"))]
    yield from (Words(words) for words, _, _ in shared_by_runs(runs, best))
    compared = [
        (index, title_of(name), (name, of)) for index, run in enumerate(runs) for name, of in models(run).items()
    ]
    if compared:
        yield _means(shared_by_runs(runs, compared))
        yield from _tasks(shared_by_runs(runs, compared))


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
    columns = {label: rows for label, _, rows in shared_by_runs(runs, found)}
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
