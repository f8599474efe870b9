"""What is left of a run: hand-worked sums and words."""

from typing import Any

import pytest

from rlhf_recipes.records.progress import Later, left_words, rough_duration, seconds_left


def progress(**changes: Any) -> Any:
    return {"stage": "ppo", "round": 1, "step": 3, "steps": 9, "seconds": None, "then": [], **changes}


def test_what_follows_is_added_as_far_as_it_is_known() -> None:
    assert seconds_left(60.0, []) == (60, 60)
    later = [Later("reward", (10.0, 10.0)), Later("ppo", (100.0, 300.0)), Later("dpo", None)]
    assert seconds_left(60.0, later) == (170, 370)


def test_what_is_left_is_said_in_no_more_digits_than_it_deserves() -> None:
    assert left_words(progress()) == ""
    assert left_words(progress(seconds=[900.0, 930.0])) == "about 15 min to 16 min left"
    assert left_words(progress(seconds=[900.0, 901.0])) == "about 15 min left"
    assert left_words(progress(seconds=[60, 60], then=["reward"])) == "about 1 min left, then reward"
    words = left_words(progress(seconds=[7200.0, 36_000.0], then=["reward", "ppo", "ppo of round 2"]))
    assert words == "about 2.0 h to 10 h left, then reward, ppo and ppo of round 2"


@pytest.mark.parametrize(("seconds", "words"), [(0, "1 min"), (5939, "99 min"), (6000, "1.7 h"), (36_000, "10 h")])
def test_a_rough_duration(seconds: float, words: str) -> None:
    assert rough_duration(seconds) == words
