"""Win rates: how often one model's answer is preferred to another's, and how sure that is. numpy alone.

A preference is a number from 0 to 1: 1 where the model's answer is better, 0.5 in a tie, or a judge's probability that
it is. n pairs of answers belong to N prompts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..records.rates import Z, effective_number, mean_rate

Array = np.ndarray

PENALTY = 0.1  # on the squares of a regression's coefficients; it matters where lengths explain everything


def preferences(ours: Sequence[float], theirs: Sequence[float]) -> Array:
    """Preferences (n,) from a judge's scores of both answers."""
    difference = np.subtract(ours, theirs, dtype=float)
    return 0.5 + 0.5 * np.sign(difference)


def win_rate(preferred: Array, ties: Array, lengths: Array, prompts: Array) -> dict[str, Any]:
    """A win rate with its 95 % interval (`rates.interval`, over prompts), beside the length-controlled one.

    Args:
        preferred: (n,) preferences for our model.
        ties: (n,) bool, pairs that are ties: half a win each, unless the judge gave probabilities.
        lengths: (n,) by how many characters our answer is longer.
        prompts: (n,) to which prompt each pair belongs, by its number.
    Returns:
        rate, low, high, prompts (N), ties (their share), length_controlled (rate, low, high), and halves (rate, low,
        high and prompts of every other prompt, and of the others; one entry where only one has pairs).
    """
    controlled = length_controlled(preferred, lengths, prompts)
    sides = [side for side in (prompts % 2 == 0, prompts % 2 == 1) if side.any()]
    return {
        **mean_rate(preferred, prompts),
        "ties": float(ties.mean()),
        "length_controlled": controlled,
        "halves": [mean_rate(preferred[side], prompts[side]) for side in sides],
    }


def length_controlled(preferred: Array, lengths: Array, prompts: Array) -> dict[str, float]:
    """AlpacaEval 2's length-controlled win rate (Dubois et al., arXiv:2404.04475, equation 2), with its 95 % interval.

    A logistic regression of the preference on the difference of the models and on that of the lengths,
    tanh(difference / its standard deviation); the win rate is what it predicts at equal lengths. Left out is their
    third term, the instruction's difficulty: its coefficients are fitted on the answers of many models, which two
    do not have. As there, a small L2 penalty keeps coefficients finite where lengths explain every preference. Where
    no length differs, or all preferences are equal, nothing is left to control, and it is the plain win rate.

    The interval is `rates.interval`'s carried over to the regression: of as many answers as are effectively
    independent, and Z^2 more of equal length, half of them won, each of which weighs as much as an answer says of the
    rate there; then the delta method. Without lengths it is the plain one. It is too narrow where lengths explain
    nearly every preference of some ten prompts.

    Args:
        preferred, lengths, prompts: (n,) as in `win_rate`.
    Returns:
        rate, low, high.
    """
    plain = mean_rate(preferred, prompts)
    if not lengths.std() or preferred.std() == 0:
        return {key: plain[key] for key in ("rate", "low", "high")}
    x = np.column_stack([np.ones(len(lengths)), np.tanh(lengths / lengths.std())])  # (n, 2)
    (model, _), covariance = fit_logistic(preferred, x, np.ones(len(x)))
    rate = sigmoid(model)
    informed = min(1.0, 1 / (len(x) * rate * (1 - rate) * covariance[0, 0]))  # an answer, where lengths are equal
    number = effective_number(plain["rate"], preferred - plain["rate"], prompts)
    weights = np.append(np.full(len(x), number / len(x)), informed * Z**2)
    (model, _), covariance = fit_logistic(np.append(preferred, 0.5), np.vstack([x, [1, 0]]), weights)
    centre = sigmoid(model)
    half = Z * centre * (1 - centre) * covariance[0, 0] ** 0.5
    return {"rate": float(rate), "low": max(centre - half, 0.0), "high": min(centre + half, 1.0)}


def fit_logistic(preferred: Array, x: Array, weights: Array) -> tuple[Array, Array]:
    """A logistic regression's coefficients (k,), and their covariance (k, k), by Newton's method: it is concave.

    Args:
        preferred: (n,) preferences.
        x: (n, k) what they are explained by: for `length_controlled` a one, and the length.
        weights: (n,) how often each preference counts.
    """
    coefficients = np.zeros(x.shape[1])
    for _ in range(100):
        predicted = sigmoid(x @ coefficients)  # (n,)
        slope = x.T @ (weights * (preferred - predicted)) - PENALTY * coefficients
        curvature = x.T @ (x * (weights * predicted * (1 - predicted))[:, None]) + PENALTY * np.eye(x.shape[1])
        step = np.linalg.solve(curvature, slope)
        # Far from the maximum, where the likelihood is nearly flat, a whole step may lead beyond it.
        step /= max(1, np.linalg.norm(step))
        coefficients = coefficients + step
        if np.abs(step).max() < 1e-6:  # the next would be about its square
            break
    return coefficients, np.linalg.inv(curvature)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))
