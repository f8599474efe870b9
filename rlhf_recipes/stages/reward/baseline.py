"""What a reward model must beat: the words alone, without their order and without the prompt."""

from collections.abc import Iterable
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PENALTY = 8.0  # half of it times the squared weights is added to the loss of all pairs


def token_scores(train: Iterable[Any], rows: Iterable[Any]) -> list[list[float]]:
    """The scores of responses by a Bradley-Terry model of their tokens, fitted to other comparisons.

    A response's score is the sum of a weight for each token that occurs in it. So this is logistic regression, over
    pairs, on which tokens the better response has and the worse one lacks.

    Args:
        train: prepared rows of the `reward` stage, to which the weights are fitted; gone through once.
        rows: those whose responses are to be scored.
    Returns:
        for each of `rows` the scores of its responses.
    """
    fitted, asked = _Tokens(train), _Tokens(rows)
    better, worse = torch.tensor(fitted.pairs, dtype=torch.long).reshape(-1, 2).unbind(1)  # (M,) each
    size = int(torch.cat([fitted.tokens, asked.tokens]).max()) + 1
    weights = nn.Parameter(
        torch.zeros(size, 1, dtype=torch.float64)
    )  # float64: the search for the minimum is a fine one
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores = fitted.scores(weights)  # (R,)
        total = nn.functional.softplus(scores[worse] - scores[better]).sum() + PENALTY / 2 * weights.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    with torch.no_grad():
        scores = iter(asked.scores(weights).tolist())
    return [[next(scores) for _ in range(count)] for count in asked.counts]


class _Tokens:
    """The different tokens of each response, without its prompt; R responses in all.

    Attributes:
        tokens: those of all responses, one response after another.
        starts: (R,), where in `tokens` each begins.
        counts: how many responses each row has.
        pairs: the numbers of the better and of the worse response of every untied pair.
    """

    def __init__(self, rows: Iterable[Any]) -> None:
        bags: list[np.ndarray] = []
        self.counts: list[int] = []
        self.pairs: list[tuple[int, int]] = []
        for row in rows:
            for (first, rank), (second, other) in combinations(enumerate(row["ranking"], len(bags)), 2):
                if rank != other:
                    self.pairs.append((first, second) if rank < other else (second, first))
            bags += [np.unique(np.array(ids[row["prompt_length"] :], np.int32)) for ids in row["responses_ids"]]
            self.counts.append(len(row["ranking"]))
        self.tokens = torch.from_numpy(np.concatenate(bags))
        self.starts = torch.tensor(np.cumsum([0, *map(len, bags[:-1])]), dtype=torch.int32)

    def scores(self, weights: Tensor) -> Tensor:
        """The sums (R,) of the weights (V, 1) of each response's tokens."""
        return nn.functional.embedding_bag(self.tokens, weights, self.starts, mode="sum")[:, 0]
