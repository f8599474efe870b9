"""Win rates with intervals."""

import math

from .contents import WinRate


def win_rate(ours: list[float], theirs: list[float]) -> WinRate:
    """Share of prompts where ours is higher, ties counting half, with Wilson's 95 % interval.

    Wilson, "Probable inference", JASA 1927. Ties make the true interval a little narrower than this one.
    """
    rate = sum((a > b) + 0.5 * (a == b) for a, b in zip(ours, theirs, strict=True)) / len(ours)
    return with_interval(rate, len(ours))


def with_interval(rate: float, n: int) -> WinRate:
    """A rate over n prompts with Wilson's 95 % interval."""
    z = 1.959964
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return {"rate": rate, "low": centre - half, "high": centre + half, "prompts": n}
