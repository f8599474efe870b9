"""How one labeler works: pace, streaks, what he leans to, and whether he says the same again."""

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import Any

import numpy as np
import pandas as pd

from .pairs import order_shown, share_with_interval
from .rows import Row


def labeler_habits(lines: pd.DataFrame, rows: Sequence[Row], fast: float) -> dict[str, Any]:
    """How one labeler works: ties, preference for what is shown first or is longer, pace, streaks, judgements repeated.

    Args:
        lines: the labeler's, with `before`, what was chosen for the same pair the last time.
        rows: the labeler's, in time.
        fast: seconds; see `pace`.
    """
    placed = lines.loc[lines["choice"] * lines["shown"] != 0]
    unequal = lines.loc[lines["choice"] * lines["longer"] != 0]
    again = lines.loc[lines["before"].notna()]
    return {
        "labels": len(rows),
        "ties": float((lines["choice"].to_numpy() == 0).mean()),
        "first_shown": share_with_interval(placed, placed["choice"] == placed["shown"]),
        "longer": share_with_interval(unequal, unequal["choice"] == unequal["longer"]),
        "again": share_with_interval(again, again["choice"] == again["before"]),
        "pace": pace(rows, fast),
        "streak": streak(rows),
    }


def pace(rows: Sequence[Row], fast: float) -> dict[str, float | None] | None:
    """Median seconds a judgement, judgements an hour at that pace, and the share that took under `fast` seconds."""
    seconds = [row["seconds"] for row in rows if row.get("seconds") is not None]
    if not seconds:
        return None
    middle = median(seconds)
    hourly = 3600 / middle if middle else None
    return {"seconds": middle, "an_hour": hourly, "fast": fmean(value < fast for value in seconds)}


def streak(rows: Sequence[Row]) -> dict[str, Any] | None:
    """The longest run of judgements whose best response was shown at the same place (0: first), and its chance.

    `chance` is the probability that so many judgements hold a run so long (or longer) if each of the K places is
    equally likely. A judgement without one best response, or without `order`, is passed over.
    """
    clear = []  # the place of the best, of how many
    for row in rows:
        order, ranking = order_shown(row), row["ranking"]
        if order and ranking.count(min(ranking)) == 1:
            clear.append((order.index(ranking.index(min(ranking))), len(order)))
    if not clear:
        return None
    longest = length = 1
    at = clear[0][0]
    for (before, _), (place, _) in pairwise(clear):
        length = length + 1 if place == before else 1
        if length > longest:
            longest, at = length, place
    return {"length": longest, "place": at, "chance": run_chance(longest - 1, [1 / count for _, count in clear[1:]])}


def run_chance(length: int, chances: Sequence[float]) -> float:
    """The probability of `length` successes in a row somewhere in independent trials with these chances of success."""
    if length == 0:
        return 1.0
    state, reached = np.eye(length)[0], 0.0  # state: the probability that the run so far is 0, 1, ... long
    for chance in chances:
        reached += state[-1] * chance
        state = np.append(state.sum() * (1 - chance), state[:-1] * chance)
    return float(reached)
