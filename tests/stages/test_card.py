"""The reward card: every number worked by hand on a few comparisons, the warnings, and the files."""

import json
import math
from itertools import count
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from rlhf_recipes.records.rates import mean_rate
from rlhf_recipes.stages.reward.card import (
    accuracy,
    by_length,
    calibration,
    demonstration_scores,
    length,
    markdown,
    measure,
    write_card,
)

prompts = count()


def row(chosen: float, rejected: float, lengths: tuple[int, int] = (5, 5), source: str | None = None) -> dict[str, Any]:
    return {
        "prompt": next(prompts),
        "chosen_score": chosen,
        "rejected_score": rejected,
        "chosen_length": lengths[0],
        "rejected_length": lengths[1],
        "token_difference": 0.0,
        "source": source,
        "swapped_difference": rejected - chosen,
    }


def repeated(times: int, *args: Any) -> list[dict[str, Any]]:
    """Alike pairs of so many prompts."""
    return [row(*args) for _ in range(times)]


def test_accuracy_counts_ties_half_and_is_split_by_source() -> None:
    rows = [row(2, 1, source="a"), row(1, 2, source="a"), row(1, 1, source="b"), row(3, 0)]
    found = measure(rows, [], 10_000)
    assert found["accuracy"]["rate"] == 2.5 / 4 and found["accuracy"]["pairs"] == 4
    assert {name: part["rate"] for name, part in found["by_source"].items()} == {"a": 0.5, "b": 0.5}
    assert [part["pairs"] for part in found["by_source"].values()] == [2, 1], "a row without a source is in neither"


def test_the_interval_of_a_pair_a_prompt_is_that_of_a_rate() -> None:
    wanted = mean_rate([1.0] * 8 + [0.0] * 2)
    assert accuracy(repeated(8, 1, 0) + repeated(2, 0, 1)) == {**wanted, "pairs": 10}


def test_the_pairs_of_a_prompt_are_no_independent_observations() -> None:
    """Rankings of 9 by a model that sees quality in noise of its own: each response's errs in all of its 8 pairs."""
    rng, inside = np.random.default_rng(0), []
    better, worse = np.triu_indices(9, 1)
    for _ in range(150):
        scores = 1.2 * np.sort(rng.normal(size=(20, 9)))[:, ::-1] + rng.normal(size=(20, 9))
        rows = [
            {**row(scores[n, i], scores[n, j]), "prompt": n}
            for n in range(20)
            for i, j in zip(better, worse, strict=True)
        ]
        found = accuracy(rows)
        inside.append(found["low"] <= 0.5 + math.atan(1.2) / math.pi <= found["high"])
    assert np.mean(inside) >= 0.93


def test_length_is_judged_as_a_rule_of_its_own() -> None:
    # Differences in score 1, -2, 3, -1 against differences in length 2, 4, 0, -2.
    rows = [row(1, 0, (4, 2)), row(0, 2, (6, 2)), row(3, 0, (5, 5)), row(0, 1, (2, 4))]
    found = length(rows)
    assert found["longer_wins"]["rate"] == (1 + 1 + 0.5 + 0) / 4
    assert found["agreement"]["rate"] == pytest.approx(2 / 3), "the first and the last pair, of three of unequal length"
    # Deviations 0.75, -2.25, 2.75, -1.25 and 1, 3, -1, -3: covariance -5, squares 14.75 and 20.
    assert found["correlation"] == pytest.approx(-5 / math.sqrt(14.75 * 20))


def test_what_is_not_defined_is_none() -> None:
    found = measure([row(1, 0), row(1, 0)], [], 10)
    assert found["length"]["agreement"] is None and found["length"]["correlation"] is None
    assert found["demonstrations"] is None
    assert "None" not in markdown(found)


def test_bins_of_length_hold_every_pair_once() -> None:
    # Chosen is longer by -4 ... 5; the model is right where it is longer.
    rows = [row(float(d > 0), 0.5, (10 + d, 10)) for d in range(-4, 6)]
    found = by_length(rows)
    assert [(part["shortest"], part["longest"]) for part in found] == [(-4, -3), (-2, -1), (0, 1), (2, 3), (4, 5)]
    assert [part["accuracy"]["rate"] for part in found] == [0, 0, 0.5, 1, 1]
    assert [part["longer_wins"]["rate"] for part in found] == [0, 0, 0.75, 1, 1]
    assert sum(part["accuracy"]["pairs"] for part in by_length(repeated(7, 1, 0))) == 7, "one length, one bin"


def test_calibration_by_hand() -> None:
    # sigma(ln 3) = 0.75. The second and fourth pairs are turned round, to 0.25 and 0.75.
    third = math.log(3)
    found = calibration([third, third, third, -third])
    low, high = found["bins"]
    assert (low["low"], low["pairs"], low["observed"]) == (0.2, 1, 0.0)
    assert (high["low"], high["pairs"], high["observed"]) == (0.7, 3, pytest.approx(2 / 3))
    assert low["predicted"] == pytest.approx(0.25) and high["predicted"] == pytest.approx(0.75)
    # One pair is 0.25 off, three are 0.75 - 2/3 off.
    assert found["expected_calibration_error"] == pytest.approx((0.25 + 3 * (0.75 - 2 / 3)) / 4)


def test_a_calibrated_model_has_no_error_and_a_boastful_one_has() -> None:
    third = math.log(3)  # three of four pairs are right, and sigma says 0.75
    calibrated = [third, third, third, third, third, third, -third, -third]
    assert calibration(calibrated)["expected_calibration_error"] == pytest.approx(0)
    boastful = calibration([100 * difference for difference in calibrated])
    assert boastful["expected_calibration_error"] == pytest.approx(0.25)


def test_swapped_places_and_demonstrations() -> None:
    rows = [row(2, 1), {**row(3, 1), "swapped_difference": -1.75}]
    assert measure(rows, [], 1)["swap_error"] == 0.25
    assert demonstration_scores([1.0, 2.0, 6.0]) == {
        "count": 3,
        "mean": 3.0,
        "sd": pytest.approx(math.sqrt((4 + 1 + 9) / 3)),
        "bias": -3.0,
    }


def mixed(right: int, wrong: int, lengths_right: tuple[int, int], lengths_wrong: tuple[int, int]) -> list[dict]:
    return repeated(right, 1, 0, lengths_right) + repeated(wrong, 0, 1, lengths_wrong)


def warnings(rows: list[dict], train_pairs: int = 10_000) -> str:
    return " ".join(measure(rows, [], train_pairs)["warnings"])


def test_each_warning_comes_at_its_threshold_and_not_before() -> None:
    assert "coin" in warnings(mixed(54, 46, (5, 5), (5, 5))) and not warnings(mixed(56, 44, (5, 5), (5, 5)))
    assert "4,999 comparisons" in warnings([row(1, 0)], 4_999) and not warnings([row(1, 0)], 5_000)


def test_a_model_of_length_alone_is_named() -> None:
    # Right in 70 of 100 pairs, and the longer response is chosen in exactly those: it is the rule itself.
    text = warnings(mixed(70, 30, (9, 5), (5, 9)))
    assert "Preferring the longer response is right in 70.0%" in text and "little but length" in text
    # Always the shorter one: as much a rule.
    assert "Preferring the shorter response is right in 70.0%" in warnings(mixed(70, 30, (5, 9), (9, 5)))
    # The same accuracy with lengths that say nothing: half of the right ones are longer, half of the wrong ones too.
    assert not warnings(mixed(35, 15, (9, 5), (9, 5)) + mixed(35, 15, (5, 9), (5, 9)))


def test_length_within_chance_is_no_finding() -> None:
    # The rule is right in 11 of 20 pairs, which is chance, though the model's own 12 of 20 are hardly more.
    rows = mixed(6, 5, (9, 5), (9, 5)) + mixed(6, 3, (5, 9), (5, 9))
    assert "Preferring" not in warnings(rows)


def test_the_files_say_what_was_measured(tmp_path: Path) -> None:
    rows = [row(math.sin(i), math.cos(3 * i), (5 + i % 7, 8), "web" if i % 2 else "books") for i in range(60)]
    found = write_card(tmp_path, rows, [0.5, 1.5], 1_234)
    assert json.loads((tmp_path / "card.json").read_text()) == found
    page = (tmp_path / "card.md").read_text()
    assert f"| all | 60 | {found['accuracy']['rate']:.1%} |" in page
    assert "1,234 pairs" in page and "| books | 30 |" in page and "bias -1.000" in page
    assert all(text in page for text in found["warnings"]) and found["warnings"]
    tables = [line.count("|") for line in page.splitlines() if line.startswith("|")]
    assert set(tables) == {5}, "every line of every table has four cells"
    assert ElementTree.parse(tmp_path / "reliability.svg").getroot().tag.endswith("svg")


def test_the_same_card_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_card(tmp_path / name, [row(2, 1), row(0, 1)], [], 7)
    for name in ("card.json", "card.md", "reliability.svg"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
