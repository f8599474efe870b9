"""Sections of results: win rates, means, tasks, and the models' answers side by side."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

from .blocks import Answers, Interval, Intervals, Table, TableRow, Words, number, percent
from .gather import Row, RunContents, best_win, by_judge, model_results, prompts_of, title_of, trust, win_rates
from .shared import shared_by_runs

ANSWERS = 1_500_000  # characters of answers in the page at most


def headline(run: RunContents) -> tuple[str, str]:
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


def results(runs: Sequence[RunContents]) -> Iterator[Any]:
    """Win rates, what the evaluation calls the best, means, and what alignment cost elsewhere."""
    entries = []
    for index, run in enumerate(runs):
        for win in win_rates(run):
            detail = f"judged by {by_judge(win['judge'])}"
            at = win.get("length_controlled")
            if at:
                detail += f"; at equal length {at['rate']:.1%} ({at['low']:.1%} to {at['high']:.1%})"
            if "ties" in win:
                detail += f"; {win['ties']:.0%} ties"
            entries.append((index, f"{title_of(win['model'])} against {title_of(win['against'])}", (win, detail)))
    entries.sort(key=lambda entry: trust(entry[2][0]["judge"]))  # so that the same judge's stand together
    rows = [
        Interval(label, detail, win["rate"], win["low"], win["high"], f"{win['prompts']:,} prompts", colour)
        for label, colour, (win, detail) in shared_by_runs(runs, entries)
    ]
    if rows:
        note = "Share of the held-out prompts on which the first one wins, with its 95 % interval. A tie counts half."
        yield Intervals("Wins", rows, note)
    evaluations = [run.evaluation or {} for run in runs]
    best = [(index, known["best"]["words"], "") for index, known in enumerate(evaluations) if known.get("best")]
    yield from (Words(words) for words, _, _ in shared_by_runs(runs, best))
    compared = [
        (index, title_of(name), (name, measured))
        for index, run in enumerate(runs)
        for name, measured in model_results(run).items()
    ]
    if compared:
        yield _means(shared_by_runs(runs, compared))
        yield from _tasks(shared_by_runs(runs, compared))


def _means(models: list[tuple[str, int | None, Any]]) -> Table:
    """Each model's mean scores and behaviour. Of the base and the SFT model no KL is shown."""
    judges = dict.fromkeys(judge for _, _, (_, measured) in models for judge in measured.get("means", {}))
    shown = [key for key in BEHAVIOUR if any(key in measured.get("behaviour", {}) for _, _, (_, measured) in models)]
    rows = []
    for label, colour, (name, measured) in models:
        # What the base and the SFT model have of KL says nothing about training against the penalty.
        behaviour = measured.get("behaviour", {})
        if name in ("base", "sft"):
            behaviour = {key: value for key, value in behaviour.items() if "kl" not in key}
        cells = [number(measured.get("means", {}).get(judge)) for judge in judges]
        rows.append(TableRow(label, cells + [BEHAVIOUR[key][1](behaviour.get(key)) for key in shown], colour))
    return Table(["model", *judges, *(BEHAVIOUR[key][0] for key in shown)], rows, "Means on held-out prompts")


def _tasks(models: list[tuple[str, int | None, Any]]) -> Iterator[Table]:
    """What alignment cost elsewhere: perplexity and tasks."""
    tasks = dict.fromkeys(
        (task, metric)
        for _, _, (_, measured) in models
        for task, metrics in measured.get("tasks", {}).items()
        for metric in metrics
    )
    has_perplexity = any("perplexity" in measured for _, _, (_, measured) in models)
    if not tasks and not has_perplexity:
        return
    rows = []
    for label, colour, (_, measured) in models:
        cells = [number(measured.get("perplexity"))] if has_perplexity else []
        for task, metric in tasks:
            result = measured.get("tasks", {}).get(task, {}).get(metric, {})
            error = result.get("error")
            cells.append(f"{number(result.get('value'))}{f' ± {number(error)}' if error is not None else ''}")
        rows.append(TableRow(label, cells, colour))
    columns = ["model", *["perplexity"] * has_perplexity, *(f"{task}, {metric}" for task, metric in tasks)]
    yield Table(columns, rows, "What it cost elsewhere")


def answers(runs: Sequence[RunContents]) -> Iterator[Any]:
    """The same prompts answered by all models. Answers that runs share, as those of one SFT model, are there once."""
    entries = []
    for index, run in enumerate(runs):
        by_model: dict[str, dict[tuple[str, int], Row]] = {}
        for key, row in prompts_of(run.answers):
            by_model.setdefault(row["model"], {})[key] = _shown(row)
        entries += [(index, title_of(model), rows) for model, rows in by_model.items()]
    columns = {label: rows for label, _, rows in shared_by_runs(runs, entries)}
    # The prompts that most models have answered come first.
    keys = sorted(
        dict.fromkeys(chain.from_iterable(columns.values())),
        key=lambda key: -sum(key in rows for rows in columns.values()),
    )
    shown, size = [], 0
    for key in keys:
        row = {"prompt": json.loads(key[0]), "answers": [rows.get(key) for rows in columns.values()]}
        size += len(json.dumps(row))
        if shown and size > ANSWERS:
            break
        shown.append(row)
    if shown:
        scored = {judge for row in shown for answer in row["answers"] if answer for judge in answer["scores"]}
        judges = sorted(scored, key=lambda judge: (trust(judge), judge))
        yield Answers({"models": list(columns), "judges": judges, "rows": shown, "prompts": len(keys)})


def _shown(row: Row) -> Row:
    """An answer as the page's script takes it: what is no number would be no JSON."""
    scores = {k: v for k, v in row.get("scores", {}).items() if isinstance(v, int | float) and math.isfinite(v)}
    kept = {"text": row["completion"], "tokens": row["tokens"], "ended": row["ended"]}
    kl = row.get("kl")
    return kept | {"scores": scores} | ({"kl": kl} if kl is not None and math.isfinite(kl) else {})
