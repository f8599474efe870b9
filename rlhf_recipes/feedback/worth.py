"""What each labeler's judgements are worth by Dawid and Skene's model, and what all say together."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from statistics import fmean

import numpy as np
import pandas as pd

from ..data.sources import MOST_RESPONSES
from .pairs import CHOICES, sums_of_prompts
from .rows import JUDGEMENT, Row

MERGED = "merged"  # the labeler of a merged row
PRIOR_PAIRS = 10  # a labeler's error rates start from the average ones, as if seen on so many pairs
LEAST_SIGNAL = 0.05  # of 2 * accuracy - 1, because a weight must be above 0


@dataclass(frozen=True)
class Worth:
    """What Dawid and Skene's model finds ("Maximum likelihood estimation of observer error-rates using the EM
    algorithm", Applied Statistics 28, 1979).

    It takes labelers to err independently of one another. Where the same pairs are hard for all, they look a few points
    more accurate than they are.
    """

    errors: np.ndarray  # (labelers, 3, 3): the probability of a choice, given what is true
    truth: dict[int, np.ndarray]  # pair -> the probabilities (3,) of the CHOICES

    @property
    def accuracy(self) -> np.ndarray:
        """(labelers,), the probability that a preference is the right one, where one response is better."""
        right, wrong = self.errors[:, 2, 2], self.errors[:, 0, 2]
        return right / (right + wrong)

    @property
    def weights(self) -> np.ndarray:
        """(labelers,), in proportion to 2 * accuracy - 1, but at least LEAST_SIGNAL.

        Labels that are right with probability a turn the gradient of a pair's loss, on average, into 2a - 1 times that
        of true labels, while its noise stays: among weighted sums of gradients of such labels, the one with weights in
        proportion to 2a - 1 has the most signal for its noise. A coin's labels hold none.
        """
        return np.maximum(2 * self.accuracy - 1, LEAST_SIGNAL)


def labeler_worth(lines: pd.DataFrame, labelers: int) -> Worth | None:
    """Each labeler's error rates, and the truth about each pair. None where no prompt has two labelers.

    The model, fitted by crowd-kit, sees the pairs that several labelers judged, each in both orders, so that it does
    not matter which response is the first in the file. Few pairs say little about a labeler, so that the average
    error rates are added to each one's, as PRIOR_PAIRS more pairs. Two labelers alone cannot be told apart: their error
    rates are the average ones.
    """
    from crowdkit.aggregation import DawidSkene

    shared = lines.loc[lines.duplicated("pair", keep=False)]
    if shared.empty:
        return None
    answers = pd.DataFrame({"task": shared["pair"], "worker": shared["labeler"], "label": shared["choice"]})
    swapped = answers.assign(task=-1 - answers["task"], label=-answers["label"])
    fitted = DawidSkene().fit_predict_proba(pd.concat([answers, swapped], ignore_index=True))
    truth = fitted.reindex(columns=CHOICES, fill_value=0.0).loc[shared["pair"]].to_numpy()
    counts = np.zeros((labelers, 3, 3))
    np.add.at(counts, (shared["labeler"], shared["choice"] + 1), truth)
    counts = (counts + counts[:, ::-1, ::-1]) / 2
    average = counts.sum(0) + 1  # a true tie may never have been seen
    average /= average.sum(0)
    errors = counts * (shared["labeler"].nunique() > 2) + PRIOR_PAIRS * average
    errors /= errors.sum(1, keepdims=True)
    return Worth(errors, _truth(lines, errors, truth.mean(0)))


def _truth(lines: pd.DataFrame, errors: np.ndarray, prior: np.ndarray) -> dict[int, np.ndarray]:
    """The probabilities of each pair's CHOICES by all judgements of it, also where there is one."""
    units, index = np.unique(lines["pair"], return_inverse=True)
    prior = (prior + prior[::-1]) / 2 + 1e-9
    logs = np.log(prior) + sums_of_prompts(index, np.log(errors[lines["labeler"], lines["choice"] + 1]))
    odds = np.exp(logs - logs.max(1, keepdims=True))
    return dict(zip(units.tolist(), odds / odds.sum(1, keepdims=True), strict=True))


def weights_of_labelers(rows: Sequence[Row], names: Sequence[str], worth: Worth | None) -> dict[str, float]:
    """Each labeler's weight, of mean 1 over the judgements. All are 1 where no prompt has two labelers."""
    signal = dict(zip(names, (1.0,) * len(names) if worth is None else worth.weights.tolist(), strict=True))
    mean = fmean(signal[row["labeler"]] for row in rows)
    return {name: value / mean for name, value in signal.items()}


def merge_judgements(rows: Sequence[Row], worth: Worth) -> list[Row]:
    """One row a prompt, for the `reward` stage: what all judgements of it say together.

    `preferences` are the probabilities that the first of a pair is better, half of that of a tie included; `ranking` is
    by the number of pairs that a response more likely wins than not, half of those that are likeliest tied included.
    """
    together: dict[str, list[Row]] = {}
    for row in rows:
        together.setdefault(row["id"], []).append(row)
    merged = []
    for index, judgements in enumerate(together.values()):
        kept = {key: value for key, value in judgements[0].items() if key not in JUDGEMENT}
        count = len(kept["responses"])
        start = index * comb(MOST_RESPONSES, 2)
        truth = np.array([worth.truth[start + pair] for pair in range(comb(count, 2))]).round(6)  # (C, 3)
        wins = np.zeros(count)
        for (first, second), (lower, tie, higher) in zip(combinations(range(count), 2), truth, strict=True):
            choice = 0 if lower == higher or tie >= max(lower, higher) else np.sign(higher - lower)
            wins[[first, second]] += choice, -choice
        labelers = list(dict.fromkeys(row["labeler"] for row in judgements))
        ranking = [1 + int((wins > own).sum()) for own in wins]
        preferences = (truth[:, 2] + truth[:, 1] / 2).clip(0, 1).tolist()
        merged.append({**kept, "ranking": ranking, "preferences": preferences, "labeler": MERGED, "labelers": labelers})
    return merged
