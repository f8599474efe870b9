"""Simulated labelers: they see gold through noise, and agree with it as often as people agree with each other."""

import math
from collections.abc import Iterable, Sequence
from random import Random

AGREEMENT = 0.73  # labelers agree with gold this often; InstructGPT's agreed with each other 72.6 +- 1.5 %


def labeler_scale(differences: Sequence[float]) -> float:
    """The scale at which a labeler agrees with gold in `AGREEMENT` of the pairs, by bisection.

    P(first preferred) = sigmoid((gold(first) - gold(second)) / scale) (Bradley and Terry).

    Args:
        differences: of the two gold scores of each pair, as absolute values. Pairs without one say nothing.
    Raises:
        ValueError: all responses are equally good.
    """
    differences = [difference for difference in differences if difference]
    if not differences:
        raise ValueError("The labelers have nothing to choose by: gold is the same for all responses.")
    low, high = 1e-3, 1e3
    for _ in range(60):
        scale = math.sqrt(low * high)
        agreement = sum(sigmoid(difference / scale) for difference in differences) / len(differences)
        low, high = (scale, high) if agreement > AGREEMENT else (low, scale)
    return low


def draw_ranking(rng: Random, scores: Iterable[float], scale: float) -> list[int]:
    """The ranks, 1 for the best, that a labeler gives to responses with these gold scores.

    They are drawn by Plackett and Luce's model. Of two responses it is Bradley and Terry's, and so it is of each pair
    of more.
    """
    # The order of utilities with Gumbel noise is a draw of that model (Yellott 1977).
    noisy = [score / scale - math.log(rng.expovariate(1.0)) for score in scores]
    best_first = sorted(noisy, reverse=True)
    return [1 + best_first.index(utility) for utility in noisy]


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1 + math.tanh(x / 2))
