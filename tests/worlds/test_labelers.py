from itertools import combinations
from random import Random

import pytest

from rlhf_recipes.worlds.labelers import AGREEMENT, draw_ranking, labeler_scale, sigmoid


def test_the_scale_is_that_at_which_labelers_agree_with_gold() -> None:
    # sigmoid(1) = 0.7310586: at a difference of 2 a scale of about 2 gives the agreement wanted.
    scale = labeler_scale([2.0, 2.0, 0.0])
    assert scale == pytest.approx(2 / 0.99462, rel=1e-4) and sigmoid(2 / scale) == pytest.approx(AGREEMENT)
    with pytest.raises(ValueError, match="gold is the same for all responses"):
        labeler_scale([0.0, 0.0])


def test_each_pair_of_a_ranking_is_decided_as_it_would_be_alone() -> None:
    rng, scores, scale, draws = Random(0), [0.0, 1.0, 3.0], 2.0, 20_000
    won = dict.fromkeys(combinations(range(3), 2), 0)
    for _ in range(draws):
        ranks = draw_ranking(rng, scores, scale)
        assert sorted(ranks) == [1, 2, 3]
        for first, second in won:
            won[first, second] += ranks[first] < ranks[second]
    for (first, second), count in won.items():
        assert count / draws == pytest.approx(sigmoid((scores[first] - scores[second]) / scale), abs=0.01)
