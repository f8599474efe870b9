"""The loss over rankings, and comparisons as tensors.

B prompts, K responses to each, R responses in all, C = K (K - 1) / 2 pairs.
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
        scores: (B, K).
        ranking: (B, K), 1 for the best, equal for ties, 0 where a row has no such response.
        margin: (B,).
        preferences: (B, K, K), the probability that the first response is better than the second; NaN: as ranked.
    Returns:
        (B,).
    """
    first, second = torch.triu_indices(*2 * ranking.shape[1:], offset=1, device=ranking.device)  # (C,), (C,)
    there = (ranking[:, first] > 0) & (ranking[:, second] > 0)  # (B, C)
    order = (ranking[:, second] - ranking[:, first]).sign()  # 1 where the first of the pair is the better, 0 in a tie
    difference = (scores[:, first] - scores[:, second]) * torch.where(order < 0, -1, 1)
    if margin is not None:
        difference = difference - margin[:, None] * order.abs()
    right = torch.where(order == 0, 0.5, 1 - label_smoothing)
    if preferences is not None:
        soft = preferences[:, first, second]  # (B, C)
        right = torch.where(soft.isnan(), right, torch.where(order < 0, 1 - soft, soft))
    losses = -(right * logsigmoid(difference) + (1 - right) * logsigmoid(-difference))
    losses = losses + center_coefficient * (scores[:, first] + scores[:, second]) ** 2
    return (losses * there).sum(1) / there.sum(1)


def untied(ranking: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of responses with different ranks: row, better and worse response of each, three (M,) of indices."""
    better = (ranking[:, :, None] < ranking[:, None, :]) & (ranking[:, :, None] > 0)  # (B, K, K)
    return better.nonzero(as_tuple=True)  # type: ignore[return-value]


def fold(scores: Tensor, ranking: Tensor) -> Tensor:
    """Scores (R,) of the responses of all rows, one after another, to (B, K), 0 where `ranking` is."""
    return scores.new_zeros(ranking.shape).masked_scatter(ranking > 0, scores)


def responses_of(row: dict[str, Any]) -> list[list[int]]:
    """The token ids of a row's responses, each with the prompt."""
    return row["responses_ids"] if "responses_ids" in row else [row["chosen_ids"], row["rejected_ids"]]


def ranking_of(rows: Sequence[dict[str, Any]]) -> Tensor:
    """The rows' ranks (B, K), 0 where a row has fewer responses than another."""
    ranks = [torch.tensor(row.get("ranking", [1, 2])) for row in rows]
    return pad(ranks, padding_value=0, padding_side="right")


def preferences_of(rows: Sequence[dict[str, Any]]) -> Tensor:
    """The rows' soft labels as (B, K, K), NaN where there is none."""
    most = max(len(row["ranking"]) for row in rows)
    result = torch.full((len(rows), most, most), float("nan"))
    for index, row in enumerate(rows):
        if row["preferences"] is not None:
            first, second = torch.triu_indices(len(row["ranking"]), len(row["ranking"]), offset=1)
            result[index, first, second] = torch.tensor(row["preferences"])
    return result
