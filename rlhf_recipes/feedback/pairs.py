"""Judgements as pairs of responses, and statistics of them with intervals over prompts.

Shapes: N lines, each a pair of responses in one judgement; P prompts; R tables.
"""

from collections.abc import Callable, Sequence
from math import comb
from typing import Any

import numpy as np
import pandas as pd

from ..data.sources import MOST_RESPONSES
from ..data.text import text
from ..records.rates import effective_number, interval, mean_rate
from .rows import Row

CHOICES = [-1, 0, 1]  # the second response is better, a tie, the first is better
JUDGE_PREFIX = "judge:"  # so begins the name of a model, which sees each pair in both orders and is never too fast

# Observed and expected disagreement (R,) of tables (R, 3, 3).
Disagreements = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def pair_lines(rows: Sequence[Row], names: Sequence[str]) -> pd.DataFrame:
    """A line for each pair of responses in each judgement.

    Returns:
        the columns labeler (the index in `names`), prompt and pair (numbers), choice (see CHOICES), and in the same
        signs `shown`, which of the two was shown earlier (0: not known), and `longer`, which has more characters.
    """
    labelers, prompts = {name: i for i, name in enumerate(names)}, {}
    parts = []
    for row in rows:
        count = len(row["responses"])
        first, second = np.triu_indices(count, 1)
        prompt = prompts.setdefault(row["id"], len(prompts))
        rank = np.array(row["ranking"])
        order = order_shown(row)
        place = np.argsort(order) if order else np.zeros(count, int)
        length = np.array([len(text(response)) for response in row["responses"]])
        signs = np.sign([rank[second] - rank[first], place[second] - place[first], length[first] - length[second]])
        fixed = np.full((2, len(first)), [[labelers[row["labeler"]]], [prompt]])
        pair = prompt * comb(MOST_RESPONSES, 2) + np.arange(len(first))
        parts.append(np.vstack([fixed, pair, signs]))
    columns = ["labeler", "prompt", "pair", "choice", "shown", "longer"]
    return pd.DataFrame(np.hstack(parts).T, columns=pd.Index(columns))


def order_shown(row: Row) -> list[int] | None:
    """The numbers of the responses in the order shown; None where it is not known, or the labeler saw both orders."""
    return None if row["labeler"].startswith(JUDGE_PREFIX) else row.get("order")


def sums_of_prompts(prompt: Any, values: np.ndarray) -> np.ndarray:
    """The sums (P, ...) of `values` (N, ...) over the lines of each prompt."""
    _, index = np.unique(prompt, return_inverse=True)
    sums = np.zeros((index.max() + 1, *values.shape[1:]))
    np.add.at(sums, index, values)
    return sums


def share_with_interval(lines: pd.DataFrame, hits: Any) -> dict[str, Any] | None:
    """The share of lines that are hits (N,), with the interval of `records.rates` over prompts. None without a line.

    Returns rate, low, high, prompts, pairs.
    """
    return None if lines.empty else {**mean_rate(hits, np.asarray(lines["prompt"])), "pairs": len(lines)}


def coefficient_interval(tables: np.ndarray, disagreements: Disagreements) -> dict[str, float]:
    """The 95 % interval of 1 - observed / expected disagreement.

    That of the observed agreement (`records.rates.interval`), beyond the expected one; the effective number of prompts
    is that of the coefficient's variance by the jackknife over prompts (Efron and Stein, Annals of Statistics 9, 1981).

    Args:
        tables: (P, 3, 3), what each prompt adds to the sums.
    """
    (observed,), (expected,) = disagreements(tables.sum(0, keepdims=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        left_out = np.divide(*disagreements(tables.sum(0) - tables))  # (P,), each without one prompt
    errors = np.nan_to_num((len(tables) - 1) * (expected * left_out - observed), posinf=0, neginf=0)
    low, high = interval(1 - observed, effective_number(1 - observed, errors, np.arange(len(tables))))
    return {"low": 1 - (1 - low) / expected, "high": 1 - (1 - high) / expected}


def kappa_disagreements(tables: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Observed and expected disagreement (R,) of tables (R, 3, 3) that count two labelers' choices: Cohen's kappa."""
    total = tables.sum((1, 2))
    expected = (tables.sum(1) * tables.sum(2)).sum(1) / total**2
    return 1 - np.trace(tables, axis1=1, axis2=2) / total, 1 - expected


def alpha_disagreements(coincidences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Observed and expected disagreement (R,) of coincidence matrices (R, 3, 3): Krippendorff's alpha, ordinal.

    Both are in units of the distance between the two preferences, which is the largest.
    """
    counts = coincidences.sum(2)
    middle = counts.cumsum(1) - counts / 2  # the mean rank of each choice; ordinal distances are between these
    distance = (middle[:, :, None] - middle[:, None, :]) ** 2
    distance = distance / distance.max((1, 2), keepdims=True)
    total = counts.sum(1)
    expected = (counts[:, :, None] * counts[:, None, :] * distance).sum((1, 2)) / (total * (total - 1))
    return (coincidences * distance).sum((1, 2)) / total, expected


def share_in_words(share: dict[str, float] | None, digits: int = 0) -> str:
    """What `share_with_interval` gives, in per cent, with so many digits of the interval; "" for None."""
    if share is None:
        return ""
    return f"{share['rate']:.1%} ({100 * share['low']:.{digits}f} to {100 * share['high']:.{digits}f})"


def coefficient_in_words(name: str, holder: dict[str, Any]) -> str:
    """The coefficient that `holder` has under a name (kappa, alpha), with its interval; "" where it is None."""
    values = holder[name]
    return "" if values is None else f"{values[name]:.2f} ({values['low']:.2f} to {values['high']:.2f})"
