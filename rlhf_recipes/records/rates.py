"""Shares with intervals: win rates, accuracies, agreement; and whether scores fell. numpy alone.

n values from 0 to 1 (a win, a tie's half, a judge's probability) belong to N prompts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .contents import WinRate

Z = 1.959964  # within so many standard deviations lie 95 % of a normal distribution
FLIPS = 4_000


def win_rate(ours: Sequence[float], theirs: Sequence[float], prompts: Sequence[Any] | None = None) -> WinRate:
    """Share of answers that score higher than theirs, ties counting half, with `mean_rate`'s interval.

    Args:
        ours, theirs: (n,) scores.
        prompts: (n,) as of `mean_rate`.
    """
    return mean_rate(0.5 + 0.5 * np.sign(np.subtract(ours, theirs, dtype=float)), prompts)


def mean_rate(values: Sequence[float] | np.ndarray, prompts: Sequence[Any] | np.ndarray | None = None) -> WinRate:
    """The mean of values with its 95 % interval: `interval`'s for the `effective_number` of prompts.

    Args:
        values: (n,) from 0 to 1.
        prompts: (n,) to which prompt each belongs; None: each to one of its own.
    """
    values = np.asarray(values, float)
    prompts = np.arange(len(values)) if prompts is None else np.asarray(prompts)
    rate = float(values.mean())
    low, high = interval(rate, effective_number(rate, values - rate, prompts))
    return {"rate": rate, "low": low, "high": high, "prompts": len(np.unique(prompts))}


def interval(rate: float, number: float, z: float = Z) -> tuple[float, float]:
    """The 95 % interval of a rate over so many independent wins and losses.

    Agresti and Coull ("Approximate is better than 'exact' for interval estimation of binomial proportions", The
    American Statistician 52, 1998): z^2 more are added, half of them wins. Its middle is that of Wilson's interval
    (JASA 1927), and it is a little wider: near 0 and 1 Wilson's holds the truth too seldom (0.84 for 10 prompts).

    Args:
        z: 1.96 for 95 %.
    """
    centre = (rate * number + z**2 / 2) / (number + z**2)
    half = z * (centre * (1 - centre) / (number + z**2)) ** 0.5
    return max(centre - half, 0.0), min(centre + half, 1.0)


def effective_number(rate: float, errors: np.ndarray, prompts: np.ndarray) -> float:
    """How many independent wins and losses say as much of a rate as values that hang together within their prompts.

    It is rate * (1 - rate) over the rate's variance, which is measured between prompts (Korn and Graubard, "Confidence
    intervals for proportions with small expected number of positive counts estimated from survey data", Survey
    Methodology 24, 1998). Ties and probabilities, which vary less than wins and losses, raise it. A few prompts may be
    alike by chance and measure no variance, so that Z^2 prompts of the rate's own variance, their values all alike,
    are averaged in: as many as `interval` adds, and more where losses (or wins) were hardly seen, fewer than Z^2. Of
    one value a prompt without ties the number is all but N.

    Args:
        rate: from 0 to 1.
        errors: (n,) n times what each value adds to the rate's error; of a mean, the value less the rate.
        prompts: (n,) to which prompt each belongs.
    """
    _, group, sizes = np.unique(prompts, return_inverse=True, return_counts=True)
    count, spread = len(sizes), rate * (1 - rate)
    number = len(errors) ** 2 / float((sizes**2).sum())  # where all values of a prompt are alike: N of equal prompts
    if spread <= 0:
        return number
    measured = float((np.bincount(group, errors) ** 2).sum()) / len(errors) ** 2 * count / max(count - 1, 1)
    added = Z**2 * max(1.0, Z**2 / (number * spread))
    return spread * (count + added) / (count * measured + added * spread / number)


def clear_fall(scores: np.ndarray, level: float = 0.05) -> int | None:
    """The model of the highest mean score, if the last one's is lower by more than chance; else None.

    The highest of several is high by luck too. So signs are flipped at random, those of all models' differences from
    the last one on a prompt together, and the highest model's t statistic is compared with the largest of all models'
    each time: Westfall and Young's max t ("Resampling-based multiple testing", 1993). Models that are alike, as
    checkpoints are, count for less than as many others. Where no model is better than the last, one is named in at most
    5 % of the cases. Fewer than five prompts are never enough.

    Args:
        scores: (K, N) of the models in their order, each a mean over a prompt's answers.
        level: 0.05, less where several such questions are asked.
    """
    count = scores.shape[1]
    falls = scores[:-1] - scores[-1]  # (K - 1, N)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (FLIPS, count))
    signs[0] = 1  # as they are
    means = signs @ falls.T / count  # (FLIPS, K - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.nan_to_num(means / np.sqrt(np.maximum((falls**2).mean(1) - means**2, 0)))  # but for a constant
    top = int(scores[:-1].mean(1).argmax())
    return top if (t.max(1) >= t[0, top] * (1 - 1e-9)).mean() <= level and t[0, top] > 0 else None
