"""Judgements as pairs of responses, and statistics of them with intervals over prompts.

Shapes: N lines, each a pair of responses in one judgement; P prompts; R resamples of the prompts.
"""

from collections.abc import Callable, Sequence
from math import comb
from typing import Any

import numpy as np
import pandas as pd

from ..data.sources import MOST_RESPONSES
from ..data.text import text
from ..records.rates import with_interval
from .rows import Row

CHOICES = [-1, 0, 1]  # the second response is better, a tie, the first is better
RESAMPLES = 1_000
JUDGE_PREFIX = "judge:"  # so begins the name of a model, which sees each pair in both orders and is never too fast


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


def bootstrap_interval(tables: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> dict[str, float]:
    """The 95 % percentile interval of a statistic of sums over prompts, each prompt drawn with replacement.

    Args:
        tables: (P, ...), what each prompt adds to the sums.
        statistic: of sums (R, ...), one number each (R,).
    """
    kinds, counts = np.unique(tables.reshape(len(tables), -1), axis=0, return_counts=True)
    draws = np.random.default_rng(0).multinomial(len(tables), counts / len(tables), size=RESAMPLES)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = statistic((draws @ kinds).reshape(-1, *tables.shape[1:]))
    low, high = np.percentile(values[np.isfinite(values)], [2.5, 97.5])
    return {"low": float(low), "high": float(high)}


def sums_of_prompts(prompt: Any, values: np.ndarray) -> np.ndarray:
    """The sums (P, ...) of `values` (N, ...) over the lines of each prompt."""
    _, index = np.unique(prompt, return_inverse=True)
    sums = np.zeros((index.max() + 1, *values.shape[1:]))
    np.add.at(sums, index, values)
    return sums


def share_with_interval(lines: pd.DataFrame, hits: Any) -> dict[str, float] | None:
    """The share of lines that are hits (N,): rate, low, high, prompts, pairs. None where there is no line.

    The interval is Wilson's over prompts where each has one line, or where drawing them anew could change nothing.
    """
    if lines.empty:
        return None
    rate = float(np.mean(hits))
    tables = sums_of_prompts(lines["prompt"], np.column_stack([hits, np.ones(len(lines))]))
    if len(tables) == len(lines) or rate in (0, 1):
        wilson = with_interval(rate, len(tables))
        interval = {"low": wilson["low"], "high": wilson["high"]}
    else:
        interval = bootstrap_interval(tables, lambda sums: sums[:, 0] / sums[:, 1])
    return {"rate": rate, **interval, "prompts": len(tables), "pairs": len(lines)}


def kappa_of(tables: np.ndarray) -> np.ndarray:
    """Cohen's kappa (R,) of tables (R, 3, 3) that count two labelers' choices."""
    total = tables.sum((1, 2))
    observed = np.trace(tables, axis1=1, axis2=2) / total
    expected = (tables.sum(1) * tables.sum(2)).sum(1) / total**2
    return (observed - expected) / (1 - expected)


def alpha_of(coincidences: np.ndarray) -> np.ndarray:
    """Krippendorff's alpha (R,), ordinal, of coincidence matrices (R, 3, 3)."""
    counts = coincidences.sum(2)
    middle = counts.cumsum(1) - counts / 2  # the mean rank of each choice; ordinal distances are between these
    distance = (middle[:, :, None] - middle[:, None, :]) ** 2
    expected = (counts[:, :, None] * counts[:, None, :] * distance).sum((1, 2)) / (counts.sum(1) - 1)
    return 1 - (coincidences * distance).sum((1, 2)) / expected


def share_in_words(share: dict[str, float] | None, digits: int = 0) -> str:
    """What `share_with_interval` gives, in per cent, with so many digits of the interval; "" for None."""
    if share is None:
        return ""
    return f"{share['rate']:.1%} ({100 * share['low']:.{digits}f} to {100 * share['high']:.{digits}f})"


def coefficient_in_words(name: str, holder: dict[str, Any]) -> str:
    """The coefficient that `holder` has under a name (kappa, alpha), with its interval; "" where it is None."""
    values = holder[name]
    return "" if values is None else f"{values[name]:.2f} ({values['low']:.2f} to {values['high']:.2f})"
