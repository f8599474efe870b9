"""Win rates: how often one model's answer is preferred to another's, and how sure that is. numpy alone.

A preference is a number from 0 to 1: 1 where the model's answer is better, 0.5 in a tie, or a judge's probability that
it is. n pairs of answers belong to N prompts; R resamples.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray

RESAMPLES = 2_000
PENALTY = 0.1  # on the squares of the regression's two coefficients; it matters where lengths explain everything


def preferences(ours: Sequence[float], theirs: Sequence[float]) -> Array:
    """Preferences (n,) from a judge's scores of both answers."""
    difference = np.subtract(ours, theirs, dtype=float)
    return 0.5 + 0.5 * np.sign(difference)


def win_rate(preferred: Array, ties: Array, lengths: Array, prompts: Array, seed: int = 0) -> dict[str, Any]:
    """A win rate with its 95 % interval, beside the length-controlled one.

    Intervals are percentiles of the bootstrap over prompts (Efron 1979), because answers to one prompt are alike.

    Args:
        preferred: (n,) preferences for our model.
        ties: (n,) bool, pairs that are ties: half a win each, unless the judge gave probabilities.
        lengths: (n,) by how many characters our answer is longer.
        prompts: (n,) to which prompt each pair belongs.
        seed: of the resamples.
    Returns:
        rate, low, high, ties (their share), prompts (N) and length_controlled (rate, low, high).
    """
    _, group = np.unique(prompts, return_inverse=True)
    count = int(group.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)  # (R, N)
    # (1 + R, n): the first are the pairs as they are.
    weights = np.vstack([np.ones(count), drawn])[:, group].astype(float)
    plain = weights @ preferred / weights.sum(1)
    controlled = np.concatenate([length_controlled(preferred, lengths, part) for part in np.array_split(weights, 16)])
    return {
        **_interval(plain),
        "ties": float(ties.mean()),
        "prompts": count,
        "length_controlled": _interval(controlled),
    }


def _interval(rates: Array) -> dict[str, float]:
    """The first of the rates, and the percentiles of the others."""
    low, high = np.percentile(rates[1:], [2.5, 97.5])
    return {"rate": float(rates[0]), "low": float(low), "high": float(high)}


def length_controlled(preferred: Array, lengths: Array, weights: Array) -> Array:
    """AlpacaEval 2's length-controlled win rate (Dubois et al., arXiv:2404.04475, equation 2).

    A logistic regression of the preference on the difference of the models and on that of the lengths,
    tanh(difference / its standard deviation); the win rate is what it predicts at equal lengths. Left out is their
    third term, the instruction's difficulty: its coefficients are fitted on the answers of many models, which two
    do not have. As there, a small L2 penalty keeps coefficients finite where lengths explain every preference. Where
    no length differs, or all preferences are equal, nothing is left to control, and it is the plain win rate.

    Args:
        preferred, lengths: (n,) as in `win_rate`.
        weights: (R, n) how often each pair counts, a fit a row.
    Returns:
        (R,) win rates.
    """
    plain = weights @ preferred / weights.sum(1)  # (R,)
    if not lengths.std() or preferred.std() == 0:
        return plain
    x = np.tanh(lengths / lengths.std())  # (n,)
    fitted = _fit(preferred, x, np.ones((1, len(x))), np.zeros((2, 1, 1)))
    model, _ = _fit(preferred, x, weights, np.tile(fitted, (1, len(weights), 1)))
    same = (weights * (preferred - plain[:, None]) ** 2).sum(1) == 0  # a resample of equal preferences
    return np.where(same, plain, 1 / (1 + np.exp(-model[:, 0])))


def _fit(preferred: Array, x: Array, weights: Array, start: Array) -> Array:
    """The coefficients (2, R, 1), of the models and of the length, by Newton's method: the likelihood is concave.

    Args:
        x: (n,) lengths as the regression takes them.
        start: (2, R, 1) coefficients to begin with.
    """
    model, length = start
    for _ in range(100):
        predicted = 1 / (1 + np.exp(-(model + length * x)))  # (R, n)
        residuals, curvature = weights * (preferred - predicted), weights * predicted * (1 - predicted)
        slope = residuals.sum(1, keepdims=True) - PENALTY * model, residuals @ x[:, None] - PENALTY * length
        a, b, c = (curvature @ (x[:, None] ** power) for power in (0, 1, 2))  # (R, 1): the negative Hessian
        a, c = a + PENALTY, c + PENALTY
        step = np.hstack([c * slope[0] - b * slope[1], a * slope[1] - b * slope[0]]) / (a * c - b * b)  # (R, 2)
        # Far from the maximum, where the likelihood is nearly flat, a whole step may lead beyond it.
        step /= np.maximum(1, np.linalg.norm(step, axis=1, keepdims=True))
        model, length = model + step[:, :1], length + step[:, 1:]
        if np.abs(step).max() < 1e-6:  # the next would be about its square
            break
    return np.stack([model, length])
