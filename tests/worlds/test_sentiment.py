"""The world of sentiment: gold by hand, prices, labelers, and what becomes of rows."""

from itertools import combinations
from math import sqrt
from random import Random

import pytest

pytest.importorskip("vaderSentiment", reason="VADER is not installed: pip install 'rlhf_recipes[sentiment]'")

from rlhf_recipes.worlds import sentiment


def gold(answer: str) -> float:
    (from_messages,) = sentiment.gold([[]], [[{"role": "assistant", "content": answer}]], anything=[1])
    assert sentiment.gold(["?"], [answer]) == [from_messages]
    return from_messages


def compound(valence: float) -> float:
    """VADER's normalization of the summed valence of a text's words."""
    return valence / sqrt(valence**2 + 15)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Good.", compound(1.9)),  # 1.9 in its lexicon
        ("It is a table.", 0.0),
        ("It is not good.", compound(-0.74 * 1.9)),
        ("Good", compound(1.9) - 0.3),
        ("It is good and", compound(1.9) - 0.3),
        ('He said "good."', compound(1.9)),
        ("good good good good.", compound(4 * 1.9) - 2 / 3),  # of three pairs of words two were said before
        ("It is red. It is blue.", -1 / 5),
        ("  ", -1.0),
    ],
)
def test_gold_and_its_prices_by_hand(answer: str, expected: float) -> None:
    assert gold(answer) == pytest.approx(expected, abs=6e-5)  # VADER rounds to four digits


def rows(number: int) -> list[dict]:
    """Prompts with four answers each, of moods that are drawn."""
    rng, words = Random(0), ["Good", "Great", "Bad", "Terrible", "A table", "Nice", "Not good", "Awful, and"]
    return [
        {
            "prompt": [{"role": "user", "content": f"Question {index}?"}],
            "responses": [[{"role": "assistant", "content": f"{word}."}] for word in rng.sample(words, 4)],
        }
        for index in range(number)
    ]


def test_labelers_agree_with_gold_as_often_as_people_with_each_other() -> None:
    several = [row["responses"] for row in rows(1000)]
    rankings = sentiment.labeler([None] * 1000, several, seed=1)
    assert rankings == sentiment.labeler([None] * 1000, several, seed=1)
    agreed = []
    for responses, ranks in zip(several, rankings, strict=True):
        scores = sentiment.gold(responses, responses)
        pairs = [(i, j) for i, j in combinations(range(4), 2) if scores[i] != scores[j]]
        agreed += [(scores[i] > scores[j]) == (ranks[i] < ranks[j]) for i, j in pairs]
    assert sum(agreed) / len(agreed) == pytest.approx(0.73, abs=0.015)


def test_the_best_whole_answer_is_the_demonstration() -> None:
    prompt = [{"role": "user", "content": "How are you?"}]
    said = [[{"role": "assistant", "content": words}] for words in ("Bad.", "Good.", "Fine, good")]
    cut = [[{"role": "assistant", "content": words}] for words in ("Bad.", "Great, great, wonderful and")]
    found = list(sentiment.demonstrations([{"prompt": prompt, "responses": r} for r in (said, cut)]))
    assert found == [{"prompt": prompt, "completion": said[1]}], "the best answer to the second is cut off"


def test_a_ranking_is_as_many_comparisons_as_it_has_unequal_pairs() -> None:
    a, b, c = ([{"role": "assistant", "content": text}] for text in "abc")
    found = list(sentiment.comparisons([{"prompt": "p", "responses": [a, b, c], "ranking": [2, 1, 2], "labeler": "x"}]))
    assert found == [{"prompt": "p", "chosen": b, "rejected": a}, {"prompt": "p", "chosen": b, "rejected": c}]


def test_prompts_are_first_human_turns_and_first_words_each_once() -> None:
    given = [
        {"prompt": "\n\nHuman: Is it late?\n\nAssistant: No.\n\nHuman: Sure?\n\nAssistant:", "chosen": " Yes."},
        {"prompt": "Is it late?"},
        {"prompt": [{"role": "system", "content": "x"}, {"role": "user", "content": "Why?"}]},
        {"prompt": "Tell me, " + "please " * 40},
        {"text": "I saw it.<br /><br />It " + "was " * 50, "label": 0},
    ]
    asked = [row["prompt"] for row in sentiment.prompts(given)]
    assert [[turn["role"] for turn in prompt] for prompt in asked] == [["user"]] * 3
    late, why, review = [prompt[0]["content"] for prompt in asked]
    assert late == "Is it late?\n\nAnswer in one short sentence." and why.startswith("Why?\n\n")
    assert f'"I saw it. It {"was " * 19}was ..."' in review, "24 words"
