"""What people say of the models' answers, two at a time and not knowing whose they are, and how far others agree.

A vote is one person's judgement of one pair. People differ, and so do prompts: the intervals are of both.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..feedback.rows import Row, read_labels
from ..recipe.values import PEOPLE
from ..records.files import Journal, write_text
from ..records.lock import held
from ..records.rates import Z, effective_number, interval, mean_rate
from .judges import Pair, Verdict, labels_file, labels_of_pairs, read_verdicts, sample_of
from .wins import fit_logistic, sigmoid

Compared = Sequence[tuple[str, str, Sequence[Pair]]]  # a model, another, and the pairs of their answers
Verdicts = Mapping[tuple[str, str], Mapping[str, Sequence[Verdict | None]]]  # both models -> judge -> on each pair
Interval = tuple[float, float]

MODELS = ["model", "against"]
COLUMNS = [*MODELS, "pair", "prompt", "person", "preferred", "ours", "theirs", "all_bad"]


def samples_file(folder: Path) -> Path:
    """Where the pairs stand that people are to judge."""
    return folder / "people.jsonl"


def write_samples(folder: Path, rows: Sequence[Row], pairs: Iterable[Pair]) -> None:
    """Write the pairs that differ as a file of samples for the page. No model is named in it.

    Args:
        rows: the prompts.
    """
    samples = {sample["id"]: sample for sample in (sample_of(rows, pair) for pair in pairs if _differ(pair))}
    write_text(samples_file(folder), "".join(json.dumps(sample) + "\n" for sample in samples.values()))


def take_labels(folder: Path, rows: Sequence[Row], pairs: Iterable[Pair], given: Path) -> None:
    """Take over what people said of these pairs elsewhere, from another file of labels.

    Raises ValueError where it holds no usable labels, or none of these pairs, or people are being asked now.
    """
    ids = {sample_of(rows, pair)["id"] for pair in pairs}
    labels = [label for label in read_labels([given]) if label["id"] in ids]
    if not labels:
        raise ValueError(f"--judge people:{given}: none of its labels is of two answers that are compared here.")
    with held(labels_file(folder, PEOPLE)):  # which the arena's page writes without holding the folder
        journal = Journal(labels_file(folder, PEOPLE))
        known = {(label["id"], label["labeler"]) for label in journal.rows}
        if new := [label for label in labels if (label["id"], label["labeler"]) not in known]:
            journal.append(*new)


def _differ(pair: Pair) -> bool:
    return pair[0].text != pair[1].text


def people_verdicts(folder: Path, rows: Sequence[Row], pairs: Sequence[Pair]) -> list[Verdict | None]:
    """What people said of each pair, on average; None of those that nobody has judged yet.

    Equal answers are a tie without any vote. So that they count for no more than they should while people are at it,
    as large a part of them is taken as of the others was judged.
    """
    verdicts = read_verdicts(labels_file(folder, PEOPLE), rows, pairs)
    different = [verdict is not None for pair, verdict in zip(pairs, verdicts, strict=True) if _differ(pair)]
    share = sum(different) / max(len(different), 1)
    seen = 0
    for number, pair in enumerate(pairs):
        if not _differ(pair):
            seen += 1
            if int(seen * share) == int((seen - 1) * share):
                verdicts[number] = None
    return verdicts


def read_votes(folder: Path, rows: Sequence[Row], compared: Compared) -> pd.DataFrame:
    """All votes on the pairs that are compared.

    Returns a row each: model, against, pair (its number), prompt (its number), person, preferred (for `model`: 1, 0 or
    in a tie 0.5), ours and theirs (the answers to a sheet, {} without one), all_bad.
    """
    votes = []
    for name, other, pairs in compared:
        for number, labels in enumerate(labels_of_pairs(labels_file(folder, PEOPLE), rows, pairs)):
            ours, theirs = pairs[number]
            for label, (preferred, _) in labels:
                sheets = label.get("sheet", [{}, {}])
                sheets = sheets if ours.text < theirs.text else sheets[::-1]
                bad = label.get("all_bad", False)
                votes.append((name, other, number, ours.row, label["labeler"], preferred, *sheets, bad))
    return pd.DataFrame(votes, columns=COLUMNS)


def people_results(votes: pd.DataFrame, verdicts: Verdicts) -> dict[str, Any] | None:
    """What evaluation.json says of the votes under `people`; None where there is none.

    Returns:
        votes (how many), people (by name how many), by_person (win rates of each two models by each person), all_bad
        (of each two models, how often neither answer was good), sheet (by model and question the share of answers so
        marked, or the mean of a scale), strengths (see `strengths`), and agreement (see `agreement`).
    """
    if votes.empty:
        return None
    compared = list(zip(votes["model"], votes["against"], strict=True))
    first = {frozenset(models): models for models in reversed(compared)}
    # Where each of two models is compared with the other, their votes count once.
    votes = votes.loc[[first[frozenset(models)] == models for models in compared]]
    return {
        "votes": len(votes),
        "people": votes["person"].value_counts().to_dict(),
        "by_person": _rates(votes, "preferred", [*MODELS, "person"]),
        "all_bad": _rates(votes, "all_bad", MODELS),
        "sheet": _sheet_results(votes),
        "strengths": strengths(votes),
        "agreement": agreement(votes, verdicts),
    }


def _rates(votes: pd.DataFrame, column: str, by: list[str]) -> list[dict[str, Any]]:
    """The mean of a column, with its interval over prompts, of each group of votes."""
    rows = []
    for names, own in votes.groupby(by, sort=False):
        key: Any = names
        rate = mean_rate(np.array(own[column], float), np.array(own["prompt"]))
        rows.append({**dict(zip(by, key, strict=True)), **rate})
    return rows


def people_interval(rate: float, pairs: np.ndarray, prompts: np.ndarray, votes: pd.DataFrame) -> Interval:
    """The 95 % interval of a win rate by people, as if other prompts had been asked and other people.

    The variance over prompts, as of any win rate, and what people differ by beyond chance: the variance of clusters in
    two ways (Cameron, Gelbach and Miller, "Robust inference with multiway clustering", JBES 29, 2011). One person
    alone shows nothing of how people differ.

    Args:
        rate: the mean of `pairs`.
        pairs: (n,) the mean preference of each pair.
        prompts: (n,) the prompts of the pairs.
        votes: on these pairs, as of `read_votes`.
    """
    errors = pairs - rate
    number, spread = effective_number(rate, errors, prompts), rate * (1 - rate)
    if spread > 0 and len({*votes["person"]}) > 1:
        _, pair, of_pair = np.unique(votes["pair"], return_inverse=True, return_counts=True)
        # What a vote adds to the rate's error.
        each = (np.array(votes["preferred"]) - rate) / of_pair[pair] / len(errors)
        beyond = _variance(_sums(each, votes["person"])) - _variance(each)
        number = spread / (spread / number + max(beyond, 0.0))
    return interval(rate, number)


def _sums(values: np.ndarray, groups: Iterable[Any]) -> np.ndarray:
    """The sums of values (n, ...) of each group (G, ...), whose members are told by `groups` (n,)."""
    names, group = np.unique(np.array(groups), return_inverse=True)
    sums = np.zeros((len(names), *values.shape[1:]))
    np.add.at(sums, group, values)
    return sums


def _variance(parts: np.ndarray) -> float:
    """The variance of a sum of independent parts, whose mean is 0."""
    return float((parts**2).sum()) * len(parts) / max(len(parts) - 1, 1)


def _sheet_results(votes: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """By model and question: rate, low, high and prompts of a mark; mean, low, high and prompts of a scale."""
    answers = defaultdict(lambda: defaultdict(list))  # model -> question -> prompt and answer
    for side, sheet in (("model", "ours"), ("against", "theirs")):
        for model, prompt, given in zip(votes[side], votes["prompt"], votes[sheet], strict=True):
            for question, answer in given.items():
                answers[model][question].append((prompt, answer))
    return {
        model: {question: _answer_result(given) for question, given in questions.items()}
        for model, questions in answers.items()
    }


def _answer_result(given: Sequence[tuple[int, int | bool]]) -> dict[str, Any]:
    """The result of one question about one model: `given` are prompts and answers."""
    prompts, values = (np.array(column) for column in zip(*given, strict=True))
    if values.dtype == bool:
        return dict(mean_rate(values.astype(float), prompts))
    mean = float(values.mean())
    sums = _sums((values - mean) / len(values), prompts)
    half = Z * _variance(sums) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half, "prompts": len(sums)}


def strengths(votes: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Bradley and Terry's strengths of all models (Biometrika 39, 1952): log odds of winning against the first one.

    Of each: strength, low, high. The interval (95 %) is of the sandwich variance over prompts.
    """
    names = list(dict.fromkeys([*votes["against"], *votes["model"]]))
    x = np.zeros((len(votes), len(names)))
    for column, sign in (("model", 1), ("against", -1)):
        x[np.arange(len(votes)), [names.index(name) for name in votes[column]]] = sign
    x, preferred = x[:, 1:], np.array(votes["preferred"], float)
    found, inverse = fit_logistic(preferred, x, np.ones(len(x)))
    pulls = x * (preferred - sigmoid(x @ found))[:, None]  # (n, K - 1) what each vote adds to the slope
    by_prompt = _sums(pulls, votes["prompt"])
    covariance = inverse @ (by_prompt.T @ by_prompt) @ inverse
    half = Z * np.sqrt(np.diag(covariance))
    result = {names[0]: {"strength": 0.0, "low": 0.0, "high": 0.0}}
    for name, strength, error in zip(names[1:], found.tolist(), half.tolist(), strict=True):
        result[name] = {"strength": strength, "low": strength - error, "high": strength + error}
    return result


def agreement(votes: pd.DataFrame, verdicts: Verdicts) -> dict[str, Any]:
    """How often each other judge prefers the answer that people prefer, and two people the same one, under `people`.

    Of the pairs on which both have a preference; judges that share no such pair with people are left out.
    """
    same, prompts = [], []
    for _, own in votes.loc[votes["preferred"] != 0.5].groupby([*MODELS, "pair"]):
        for one, other in combinations(own["preferred"], 2):
            same.append(float(one == other))
            prompts.append(own["prompt"].iloc[0])
    results = {PEOPLE: mean_rate(same, prompts)} if same else {}
    by_pair = votes.groupby([*MODELS, "pair"]).agg({"preferred": "mean", "prompt": "first"}).reset_index()
    agreeing = defaultdict(list)
    for name, other, pair, preferred, prompt in by_pair.itertuples(index=False):
        for judge, said in verdicts[name, other].items():
            verdict = said[pair]
            if judge != PEOPLE and verdict is not None and 0.5 not in (verdict[0], preferred):
                agreeing[judge].append((float((verdict[0] > 0.5) == (preferred > 0.5)), prompt))
    return results | {judge: mean_rate(*map(list, zip(*found, strict=True))) for judge, found in agreeing.items()}
