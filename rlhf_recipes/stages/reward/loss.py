"""The loss over rankings, and comparisons as tensors.

B prompts; K responses to each, or to the prompt that has most; R responses in all; C = K (K - 1) / 2 pairs of K
responses; M pairs in all that are no ties. A chosen and a rejected response are the case K = 2 with ranks 1 and 2.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl.trainer.utils import pad


def ranking_loss(
    scores: Tensor,
    ranking: Tensor,
    margin: Tensor | None = None,
    label_smoothing: float = 0.0,
    center_coefficient: float = 0.0,
    preferences: Tensor | None = None,
) -> Tensor:
    """Each row's mean loss over the C(K, 2) pairs of its K responses (InstructGPT, arXiv:2203.02155, equation 1).

    A pair's loss is -[p log sigma(d) + (1 - p) log sigma(-d)] + center_coefficient * (r_better + r_worse)^2 with
    d = r_better - r_worse - margin and p = 1 - label_smoothing (arXiv:2401.06080); of a tie, p is 0.5 and there is no
    margin; where the pair has a soft label, p is that. The square is TRL's `center_rewards_coefficient`
    (arXiv:2312.09244, equation 2), taken pair by pair: a ranking costs what its pairs cost on average, and at K = 2
    all is as in TRL.

    Args:
        scores: (B, K), what the reward model gives.
        ranking: (B, K) whole numbers, 1 for the best, equal for ties, 0 where a row has no such response.
        margin: (B,), by how much the better response of a pair should score higher.
        label_smoothing: the share of judgements that is taken to be wrong, 0 to 0.5.
        center_coefficient: how strongly scores are drawn to a mean of 0.
        preferences: (B, K, K), the probability that the first response is better than the second; NaN: as ranked.
    Returns:
        The losses (B,), in nats.
    """
    first, second = torch.triu_indices(*2 * ranking.shape[1:], offset=1, device=ranking.device)  # (C,), (C,)
    there = (ranking[:, first] > 0) & (ranking[:, second] > 0)  # (B, C)
    order = (ranking[:, second] - ranking[:, first]).sign()  # 1 where the first of the pair is the better, 0 in a tie
    difference = (scores[:, first] - scores[:, second]) * torch.where(order < 0, -1, 1)  # (B, C), better less worse
    if margin is not None:
        difference = difference - margin[:, None] * order.abs()
    right = torch.where(order == 0, 0.5, 1 - label_smoothing)  # (B, C), the p of the docstring
    if preferences is not None:
        soft = preferences[:, first, second]  # (B, C)
        right = torch.where(soft.isnan(), right, torch.where(order < 0, 1 - soft, soft))
    losses = -(right * logsigmoid(difference) + (1 - right) * logsigmoid(-difference))  # (B, C)
    losses = losses + center_coefficient * (scores[:, first] + scores[:, second]) ** 2
    return (losses * there).sum(1) / there.sum(1)


def untied(ranking: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of different ranks in a `ranking` (B, K): row, better and worse response of each, (M,) indices each."""
    better = (ranking[:, :, None] < ranking[:, None, :]) & (ranking[:, :, None] > 0)  # (B, K, K)
    return better.nonzero(as_tuple=True)  # type: ignore[return-value]


def fold(scores: Tensor, ranking: Tensor) -> Tensor:
    """Scores (R,) of the responses of all rows, one after another, as (B, K), 0 where `ranking` (B, K) is 0."""
    return scores.new_zeros(ranking.shape).masked_scatter(ranking > 0, scores)


def stack_rankings(rows: Sequence[dict[str, Any]]) -> Tensor:
    """The `ranking` of B rows as (B, K), 0 where a row has fewer responses than another."""
    return pad([torch.tensor(row["ranking"]) for row in rows], padding_value=0, padding_side="right")


def stack_preferences(rows: Sequence[dict[str, Any]]) -> Tensor:
    """The soft labels, `preferences`, of B rows as (B, K, K): above the diagonal, and NaN where a row has none."""
    most = max(len(row["ranking"]) for row in rows)
    stacked = torch.full((len(rows), most, most), float("nan"))  # (B, K, K)
    for index, row in enumerate(rows):
        if row["preferences"] is not None:
            first, second = torch.triu_indices(len(row["ranking"]), len(row["ranking"]), offset=1)  # (C,), (C,)
            stacked[index, first, second] = torch.tensor(row["preferences"])
    return stacked
