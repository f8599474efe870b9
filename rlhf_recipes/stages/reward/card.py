"""The reward card: what a reward model gets right, what it may only seem to, and how far its scores can be trusted.

Everything is measured on held-out comparisons. A pair's difference is r(chosen) - r(rejected); sigma of it is the
probability that the model gives to the choice (Bradley and Terry). A length is in response tokens.
"""

import json
import math
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TypedDict

import numpy as np

from ...records.contents import (
    Calibration,
    DemonstrationScores,
    LengthBin,
    LengthRule,
    PairMeasures,
    PairShare,
    ProbabilityBin,
    RewardCard,
)
from ...records.rates import win_rate

CARD = "card.json"  # in the folder of the stage

LOW_ACCURACY = 0.55  # a coin gets 0.5, and models of 1B to 7B got 0.63 to 0.69 on TL;DR (arXiv:2403.17031)
FEW_PAIRS = 5_000
LENGTH_SHARE = 0.9  # length alone explains the model if it reaches so much of the model's lift over 0.5,
LENGTH_AGREEMENT = 0.85  # or if the model prefers the longer (or the shorter) response in more than so many pairs

LENGTH_BINS = 5  # of about equally many pairs

PROBABILITY_BINS = 10  # of equal width


class ScoredPair(TypedDict):
    """A held-out comparison, and what the reward model says of it."""

    prompt: int  # pairs of the same one hang together
    chosen_score: float
    rejected_score: float
    chosen_length: int  # response tokens
    rejected_length: int
    token_difference: float  # chosen less rejected, by `baseline.token_scores`
    source: str | None
    swapped_difference: float | None  # first answer less second, scored anew in another order; None: not in the sample


def write_card(folder: Path, rows: list[ScoredPair], demonstrations: list[float], train_pairs: int) -> RewardCard:
    """Measure a reward model and write `card.json`, `card.md` and `reliability.svg` into its folder.

    Args:
        rows: the held-out comparisons. A pair's `swapped_difference`, if any, is minus its difference, to rounding.
        demonstrations: the scores of held-out demonstrations; may be empty.
        train_pairs: comparisons that the model was trained on.
    Returns:
        the contents of `card.json`. Its `warnings` are sentences for the user.
    """
    assert rows, "a stage holds out at least one row"
    card = measure(rows, demonstrations, train_pairs)
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n")
    (folder / "card.md").write_text(markdown(card))
    _plot(card["calibration"], folder / "reliability.svg")
    return card


def measure(rows: list[ScoredPair], demonstrations: list[float], train_pairs: int) -> RewardCard:
    """All numbers of the card, and its warnings. Arguments as of `write_card`."""
    swapped = [(row, row["swapped_difference"]) for row in rows]
    card: RewardCard = {
        "train_pairs": train_pairs,
        **measure_pairs(rows),
        "swap_error": max((abs(_difference(row) + other) for row, other in swapped if other is not None), default=0.0),
        "demonstrations": demonstration_scores(demonstrations),
        "warnings": [],
    }
    return {**card, "warnings": warnings(card)}


def measure_pairs(rows: list[ScoredPair]) -> PairMeasures:
    """What is right, of which pairs, beside what length and words alone would get; whether scores are calibrated."""
    sources = sorted({row["source"] for row in rows if row["source"] is not None})
    return {
        "accuracy": accuracy(rows),
        "by_source": {source: accuracy([row for row in rows if row["source"] == source]) for source in sources},
        "tokens_win": _share(rows, lambda row: row["token_difference"]),
        "length": length(rows),
        "by_length": by_length(rows),
        "calibration": calibration([_difference(row) for row in rows]),
    }


def _difference(row: ScoredPair) -> float:
    """By how much the chosen response scores higher."""
    return row["chosen_score"] - row["rejected_score"]


def _longer_by(row: ScoredPair) -> int:
    """By how many tokens the chosen response is longer."""
    return row["chosen_length"] - row["rejected_length"]


def _share(rows: list[ScoredPair], value: Callable[[ScoredPair], float]) -> PairShare:
    """Share of rows whose value is above 0, a value of 0 counting half, with the 95 % interval of `records.rates`.

    The pairs of a ranking share its responses, and so do not say as much as pairs of different prompts.
    """
    wins = win_rate([value(row) for row in rows], [0.0] * len(rows), [row["prompt"] for row in rows])
    return {**wins, "pairs": len(rows)}


def accuracy(rows: list[ScoredPair]) -> PairShare:
    """Share of pairs whose chosen response scores higher, as `_share` gives it: equal scores count half."""
    return _share(rows, _difference)


def length(rows: list[ScoredPair]) -> LengthRule:
    """How far length goes: the accuracy of preferring the longer response, and how much the model follows that rule.

    `agreement` is the share of pairs of unequal length in which the model scores the longer one higher; `correlation`
    is Pearson's, between the differences in score and in length. Each is None where it is not defined.
    """
    unequal = [row for row in rows if _longer_by(row) != 0]
    scores, lengths = [_difference(row) for row in rows], [_longer_by(row) for row in rows]
    varied = len(set(scores)) > 1 and len(set(lengths)) > 1
    return {
        "longer_wins": _share(rows, _longer_by),
        "agreement": _share(unequal, lambda row: _difference(row) * _longer_by(row)) if unequal else None,
        "correlation": statistics.correlation(scores, lengths) if varied else None,
    }


def by_length(rows: list[ScoredPair]) -> list[LengthBin]:
    """Accuracy by how much longer the chosen response is, in bins of about equally many pairs.

    Pairs of the same difference stay together, so there may be fewer than LENGTH_BINS bins.
    """
    lengths = [_longer_by(row) for row in rows]
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, LENGTH_BINS + 1)))
    edges[-1] += 1
    bins = []
    for low, high in pairwise(edges) if len(edges) > 1 else [(-math.inf, math.inf)]:
        inside = [row for row in rows if low <= _longer_by(row) < high]
        if inside:
            shortest, longest = min(map(_longer_by, inside)), max(map(_longer_by, inside))
            longer_wins = _share(inside, _longer_by)
            bins.append(
                LengthBin(shortest=shortest, longest=longest, accuracy=accuracy(inside), longer_wins=longer_wins)
            )
    return bins


def calibration(differences: list[float]) -> Calibration:
    """Whether sigma(r_a - r_b) is the probability that a is the chosen one.

    Of every other pair the rejected response is taken as a: otherwise a would always be the chosen one. The expected
    calibration error is the mean over pairs of |predicted - observed| of their bin (Guo et al., arXiv:1706.04599).
    `bins` are those of the PROBABILITY_BINS that hold a pair, from `low` to `high`.
    """
    oriented = [(difference, 1.0) if i % 2 == 0 else (-difference, 0.0) for i, difference in enumerate(differences)]
    predicted = [_sigmoid(difference) for difference, _ in oriented]
    bins: dict[int, list[tuple[float, float]]] = {}
    for p, (_, chosen) in zip(predicted, oriented, strict=True):
        bins.setdefault(min(int(p * PROBABILITY_BINS), PROBABILITY_BINS - 1), []).append((p, chosen))
    table: list[ProbabilityBin] = [
        {
            "low": index / PROBABILITY_BINS,
            "high": (index + 1) / PROBABILITY_BINS,
            "pairs": len(members),
            "predicted": statistics.fmean(p for p, _ in members),
            "observed": statistics.fmean(chosen for _, chosen in members),
        }
        for index, members in sorted(bins.items())
    ]
    error = sum(row["pairs"] * abs(row["predicted"] - row["observed"]) for row in table) / len(differences)
    return {"expected_calibration_error": error, "bins": table}


def _sigmoid(x: float) -> float:
    """1 / (1 + exp(-x))."""
    return 0.5 * (1 + math.tanh(x / 2))  # exp would overflow


def demonstration_scores(scores: list[float]) -> DemonstrationScores | None:
    """Mean and standard deviation of the demonstrations' scores; InstructGPT's bias, which brings the mean to 0."""
    if not scores:
        return None
    mean = statistics.fmean(scores)
    return {"count": len(scores), "mean": mean, "sd": statistics.pstdev(scores), "bias": -mean}


def warnings(card: RewardCard) -> list[str]:
    """Sentences about what makes this reward model a doubtful one to train against."""
    rate, pairs, sentences = card["accuracy"]["rate"], card["train_pairs"], []
    if rate < LOW_ACCURACY:
        sentences.append(
            f"The held-out accuracy is {rate:.1%}; a coin gets 50 %. PPO against such a reward learns mostly noise: "
            "train on more comparisons, or from a better base."
        )
    if pairs < FEW_PAIRS:
        sentences.append(f"It was trained on {pairs:,} comparisons. Under {FEW_PAIRS:,}, expect it to be gamed early.")
    rule, agreement = card["length"]["longer_wins"], card["length"]["agreement"]
    word = "longer" if rule["rate"] >= 0.5 else "shorter"
    lift = abs(rule["rate"] - 0.5)
    beyond_chance = rule["low"] > 0.5 or rule["high"] < 0.5
    if beyond_chance and lift >= LENGTH_SHARE * (rate - 0.5):
        sentences.append(
            f"Preferring the {word} response is right in {0.5 + lift:.1%} of the pairs, the model in {rate:.1%}: "
            "length alone may be what it learned."
        )
    if agreement is not None and abs(agreement["rate"] - 0.5) > LENGTH_AGREEMENT - 0.5:
        followed, word = agreement["rate"], "longer" if agreement["rate"] > 0.5 else "shorter"
        sentences.append(
            f"The model prefers the {word} response in {max(followed, 1 - followed):.1%} of the pairs: it may score "
            "little but length."
        )
    return sentences


def markdown(card: RewardCard) -> str:
    """The card as a page of tables."""
    lines = ["# Reward card", "", *[f"> **Warning.** {text}\n" for text in card["warnings"]]]
    lines += ["| | held-out pairs | accuracy | 95 % interval |", "|---|---:|---:|---:|", _line("all", card["accuracy"])]
    lines += [_line(source, share) for source, share in card["by_source"].items()]
    lines += [_line("the rule: the longer response wins", card["length"]["longer_wins"])]
    lines += [_line("the words alone, by a logistic regression", card["tokens_win"]), ""]
    held_out = f"{card['accuracy']['pairs']:,} pairs of {card['accuracy']['prompts']:,} prompts are held out"
    lines += [f"Trained on {card['train_pairs']:,} pairs; {held_out}.", "", "## Length", ""]
    agreement, correlation = card["length"]["agreement"], card["length"]["correlation"]
    if agreement is not None:
        lines += [f"The model prefers the longer response in {agreement['rate']:.1%} of the pairs of unequal length."]
    if correlation is not None:
        lines += [f"Correlation of the differences in score and in length: {correlation:.2f}."]
    lines += ["", "| chosen is longer by, tokens | pairs | accuracy | longer wins |", "|---|---:|---:|---:|"]
    lines += [
        f"| {row['shortest']} to {row['longest']} | {row['accuracy']['pairs']} | {row['accuracy']['rate']:.1%} "
        f"| {row['longer_wins']['rate']:.1%} |"
        for row in card["by_length"]
    ]
    lines += ["", "## Calibration", "", "![reliability](reliability.svg)", ""]
    lines += [f"Expected calibration error: {card['calibration']['expected_calibration_error']:.3f}.", ""]
    lines += ["| predicted probability | pairs | mean predicted | observed |", "|---|---:|---:|---:|"]
    lines += [
        f"| {row['low']:.1f} to {row['high']:.1f} | {row['pairs']} | {row['predicted']:.2f} | {row['observed']:.2f} |"
        for row in card["calibration"]["bins"]
    ]
    error = card["swap_error"]
    lines += ["", "## Scores", "", f"Largest error when the two answers of a pair swap places: {error:.2g} (a sample)."]
    if card["demonstrations"] is not None:
        scores = card["demonstrations"]
        lines += [
            f"{scores['count']} demonstrations score {scores['mean']:.3f} on average (standard deviation "
            f"{scores['sd']:.3f}); the bias {scores['bias']:+.3f} brings the mean to 0."
        ]
    return "\n".join(lines) + "\n"


def _line(name: str, share: PairShare) -> str:
    """A share of pairs with its interval, as a row of the first table."""
    return f"| {name} | {share['pairs']} | {share['rate']:.1%} | {share['low']:.1%} to {share['high']:.1%} |"


def _plot(calibrated: Calibration, path: Path) -> None:
    """Draw the reliability diagram: of each bin of `calibration` the observed share over the predicted one."""
    # Imported here because it costs half a second. The Figure alone draws with no display, and touches no global state.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    bins = calibrated["bins"]
    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.add_subplot(
        xlabel="predicted probability", ylabel="share chosen", xlim=(0, 1), ylim=(0, 1), aspect="equal"
    )
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--")
    sizes = [200 * row["pairs"] / max(row["pairs"] for row in bins) for row in bins]
    axes.plot([row["predicted"] for row in bins], [row["observed"] for row in bins], color="C0")
    axes.scatter([row["predicted"] for row in bins], [row["observed"] for row in bins], s=sizes, color="C0", alpha=0.6)
    axes.set_title(f"Calibration error {calibrated['expected_calibration_error']:.3f}")
    with rc_context({"svg.hashsalt": "reward card"}):  # the same card gives the same file
        figure.savefig(path, format="svg", metadata={"Date": None})
