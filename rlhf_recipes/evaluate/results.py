"""What an evaluation found, as answers.jsonl and evaluation.json hold it, with what earlier calls found of the same."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..feedback.rows import Row
from ..feedback.sample import prompt_id
from ..recipe.values import PEOPLE
from ..records.files import WRITE_AGAIN, read_json, read_rows, write_json, write_text
from . import wins
from .behaviour import behaviour_panel
from .judges import Pair, Verdict, known_identity, labels_file, read_verdicts
from .measurements import Measurements
from .people import Verdicts, people_interval, people_results, people_verdicts, read_votes
from .verdict import evaluation_warnings, policy_to_ship


def write_results(run_dir: Path, out: Path, measured: Measurements) -> dict[str, Any]:
    """Write answers.jsonl and evaluation.json to the folder `out`, and return what the second holds.

    What earlier calls wrote there of the same answers and models, by judges and tasks that are the same now but were
    not named this time, stands in both again.
    """
    path, plan = out / "evaluation.json", measured.plan
    before = read_json(path) or {"judges": {}, "models": {}}
    if not all(isinstance(before.get(key), dict) for key in ("judges", "models")):
        raise ValueError(f"{path} is not what `evaluate` writes. {WRITE_AGAIN}")
    identities = {judge.name: judge.identity for judge in plan.judges}
    earlier = {
        name: identity
        for name, identity in before["judges"].items()
        if name not in identities and _is_same_judge(run_dir, out, measured, name, identity)
    }
    identities |= earlier
    _recall_scores(out / "answers.jsonl", measured, earlier)
    _recall_tax(measured, before["models"])
    rows = [row for name in measured.answers for row in _answer_rows(measured, name)]
    write_text(out / "answers.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    verdicts = _verdicts(out, measured, identities)
    votes = read_votes(out, plan.rows, measured.compared_pairs())
    result: dict[str, Any] = {
        "against": plan.against,
        "prompts": len(plan.rows),
        "samples": measured.settings.samples,
        "seed": measured.settings.seed,
        "temperature": plan.temperature,
        "response_length": plan.response_length,
        "judges": identities,
        "models": {name: _model_entry(measured, name) for name in measured.answers},
        "wins": _win_entries(measured, verdicts, votes),
        "people": people_results(votes, verdicts),
    }
    models_asked = [name for name, identity in identities.items() if labels_file(out, identity).is_file()]
    result["best"] = policy_to_ship(result, models_asked)
    result["warnings"] = [*plan.warnings, *evaluation_warnings(result, measured.scores, models_asked)]
    write_json(path, result)
    return result


def _is_same_judge(run_dir: Path, out: Path, measured: Measurements, name: str, identity: str) -> bool:
    """Whether a judge of an earlier call would say the same now. The labels of a model that was asked are kept."""
    asked = str(identity).isalnum() and labels_file(out, identity).is_file()  # a path would lead out of the folder
    return asked or known_identity(name, run_dir, measured.plan.recipe) == identity


def _recall_scores(path: Path, measured: Measurements, earlier: Mapping[str, str]) -> None:
    """Take over, from an earlier answers.jsonl, what its judges said of the same answers."""
    rows = [row for row in read_rows(path) if isinstance(row.get("scores"), dict)]
    scores_by_key = {str(row.get("key")): row["scores"] for row in rows}
    for judge in earlier:
        for name, answers in measured.answers.items():
            scores = [scores_by_key.get(answer.key, {}).get(judge) for answer in answers]
            if all(type(score) in (int, float) for score in scores):
                measured.scores.setdefault(judge, {})[name] = scores


def _recall_tax(measured: Measurements, before: Mapping[str, Mapping[str, Any]]) -> None:
    """Take over perplexities and tasks of the same models that were not asked for now.

    Args:
        before: what an earlier evaluation.json says of each model.
    """
    tasks_now = {task for tasks in measured.tasks.values() for task in tasks}
    for name, entry in before.items():
        if entry["weights"] != measured.weights.get(name):
            continue
        if not measured.plan.texts and "perplexity" in entry:
            measured.perplexity[name] = entry["perplexity"]
        kept = {task: metrics for task, metrics in entry.get("tasks", {}).items() if task not in tasks_now}
        if kept:
            measured.tasks[name] = kept | measured.tasks.get(name, {})


def _answer_rows(measured: Measurements, name: str) -> list[Row]:
    """A model's answers as answers.jsonl has them."""
    rows = []
    for index, answer in enumerate(measured.answers[name]):
        prompt = measured.plan.rows[answer.row]["prompt"]
        scores = {judge: by_model[name][index] for judge, by_model in measured.scores.items() if name in by_model}
        row = {"id": prompt_id(prompt), "model": name, "sample": answer.sample, "prompt": prompt}
        row |= {"completion": answer.text, "tokens": len(answer.ids), "ended": answer.ended}
        row |= {} if answer.kl is None else {"kl": answer.kl}
        rows.append(row | {"scores": scores, "key": answer.key})
    return rows


def _model_entry(measured: Measurements, name: str) -> dict[str, Any]:
    """What evaluation.json says of a model."""
    opponent, answers = measured.plan.opponent, measured.answers[name]
    if opponent is not None and name == opponent.name:  # which has one answer to each prompt, however often it is there
        answers = answers[:: measured.settings.samples]
    entry: dict[str, Any] = {
        "weights": measured.weights[name],
        "means": {
            judge: float(np.mean(by_model[name])) for judge, by_model in measured.scores.items() if name in by_model
        },
        "behaviour": behaviour_panel(answers, measured.opinions[name]) | measured.under_base.get(name, {}),
    }
    if name in measured.perplexity:
        entry["perplexity"] = measured.perplexity[name]
    if name in measured.tasks:
        entry["tasks"] = measured.tasks[name]
    return entry


def _verdicts(out: Path, measured: Measurements, identities: Mapping[str, str]) -> Verdicts:
    """What each judge says of each pair, for all models that are compared; without the judges that say nothing."""
    verdicts: dict[tuple[str, str], dict[str, list[Verdict | None]]] = {}
    for name, other, pairs in measured.compared_pairs():
        said = verdicts[name, other] = {}
        for judge, identity in identities.items():
            scores = measured.scores.get(judge, {})
            if name in scores and other in scores:
                preferred = wins.preferences(scores[name], scores[other])
                said[judge] = [(value, value == 0.5) for value in preferred.tolist()]
                continue
            found = (
                people_verdicts(out, measured.plan.rows, pairs)
                if judge == PEOPLE
                else read_verdicts(labels_file(out, identity), measured.plan.rows, pairs)
            )
            # Equal answers are a tie without any question, so that they alone say nothing of the judge.
            if any(verdict and ours.text != theirs.text for (ours, theirs), verdict in zip(pairs, found, strict=True)):
                said[judge] = found
    return verdicts


def _win_entries(measured: Measurements, verdicts: Verdicts, votes: pd.DataFrame) -> list[dict[str, Any]]:
    """The win rates of each model by each judge that said something of its answers."""
    entries = []
    for name, other, pairs in measured.compared_pairs():
        for judge, said in verdicts[name, other].items():
            own = votes.loc[(votes["model"] == name) & (votes["against"] == other)] if judge == PEOPLE else None
            entries.append({"model": name, "against": other, "judge": judge, **_win_rate(pairs, said, own)})
    return entries


def _win_rate(pairs: Sequence[Pair], verdicts: Sequence[Verdict | None], votes: pd.DataFrame | None) -> dict[str, Any]:
    """The win rate over the pairs that have a verdict; see `wins.win_rate`.

    Args:
        votes: of people, if they are the judge, whose interval is of these as well.
    """
    judged = [(pair, verdict) for pair, verdict in zip(pairs, verdicts, strict=True) if verdict is not None]
    preferred, ties = (np.array(column) for column in zip(*(verdict for _, verdict in judged), strict=True))
    lengths = np.array([len(ours.text) - len(theirs.text) for (ours, theirs), _ in judged])
    prompts = np.array([ours.row for (ours, _), _ in judged])
    rate = wins.win_rate(preferred, ties, lengths, prompts)
    if votes is not None:
        rate["low"], rate["high"] = people_interval(rate["rate"], preferred, prompts, votes)
    return rate
