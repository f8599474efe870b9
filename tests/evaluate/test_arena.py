"""What people say of the models, by hand: votes, intervals over prompts and people, strengths, sheets, agreement."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rlhf_recipes.evaluate.judges import labels_file, sample_of
from rlhf_recipes.evaluate.models import Answer
from rlhf_recipes.evaluate.people import (
    COLUMNS,
    agreement,
    people_interval,
    people_results,
    people_verdicts,
    read_votes,
    samples_file,
    strengths,
    take_labels,
    write_samples,
)
from rlhf_recipes.recipe.values import PEOPLE
from rlhf_recipes.records.lock import held
from rlhf_recipes.records.rates import mean_rate


def answer(model: str, row: int, text: str) -> Answer:
    return Answer("", model, row, 0, [], True, None, text)


def votes_of(*votes: tuple[Any, ...]) -> pd.DataFrame:
    """Votes of ppo against sft, each: pair, person, preferred; and sheets and whether both are bad, where given."""
    rows = [
        ("ppo", "sft", pair, pair, person, preferred, *(more or ({}, {}, False)))
        for pair, person, preferred, *more in votes
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


ROWS = [{"prompt": f"p{number}"} for number in range(4)]
PAIRS = [
    (answer("ppo", 0, "a"), answer("sft", 0, "b")),
    (answer("ppo", 1, "d"), answer("sft", 1, "c")),
    (answer("ppo", 2, "e"), answer("sft", 2, "e")),
    (answer("ppo", 3, "g"), answer("sft", 3, "f")),
]


def label(number: int, person: str, ranking: list[int], **more: Any) -> str:
    """A judgement of a pair: `ranking` is of its texts in the order of the alphabet."""
    return json.dumps({**sample_of(ROWS, PAIRS[number]), "ranking": ranking, "labeler": person, **more}) + "\n"


def test_votes_know_whose_answer_was_preferred_and_marked(tmp_path: Path) -> None:
    write_samples(tmp_path, ROWS, PAIRS)
    samples = samples_file(tmp_path).read_text()
    assert len(samples.splitlines()) == 3 and "ppo" not in samples and "sft" not in samples
    sheet = [{"made_up": True}, {"made_up": False}]  # of c, sft's, and of d, ppo's
    labels_file(tmp_path, PEOPLE).write_text(
        label(0, "Ann", [1, 2]) + label(1, "Ann", [1, 2], sheet=sheet) + label(1, "Bob", [1, 1], all_bad=True)
    )
    votes = read_votes(tmp_path, ROWS, [("ppo", "sft", PAIRS), ("sft", "ppo", [pair[::-1] for pair in PAIRS])])
    assert votes["preferred"].tolist() == [1.0, 0.0, 0.5, 0.0, 1.0, 0.5]
    assert votes["ours"].tolist() == [{}, sheet[1], {}, {}, sheet[0], {}]
    # Two of the three pairs that differ are judged, so that the equal one counts no more than two thirds: not at all.
    assert people_verdicts(tmp_path, ROWS, PAIRS) == [(1.0, False), (0.25, False), None, None]
    with labels_file(tmp_path, PEOPLE).open("a") as stream:
        stream.write(label(3, "Bob", [2, 1]))
    assert people_verdicts(tmp_path, ROWS, PAIRS) == [(1.0, False), (0.25, False), (0.5, True), (1.0, False)]
    results = people_results(votes, {("ppo", "sft"): {}, ("sft", "ppo"): {}})
    assert results is not None and results["votes"] == 3 and results["people"] == {"Ann": 2, "Bob": 1}
    assert [(row["person"], row["rate"]) for row in results["by_person"]] == [("Ann", 0.5), ("Bob", 0.5)]
    assert [(row["model"], row["rate"]) for row in results["all_bad"]] == [("ppo", pytest.approx(1 / 3))]
    assert {model: found["made_up"]["rate"] for model, found in results["sheet"].items()} == {"ppo": 0.0, "sft": 1.0}
    assert people_results(votes.iloc[:0], {}) is None


def test_what_people_said_elsewhere_is_taken_over_once(tmp_path: Path) -> None:
    given, own = tmp_path / "given.jsonl", labels_file(tmp_path, PEOPLE)
    other = json.dumps({"id": "x", "prompt": "p", "responses": ["a", "b"], "ranking": [1, 2], "labeler": "Ann"}) + "\n"
    given.write_text(other)
    with pytest.raises(ValueError, match=r"people:.*given.jsonl: none of its labels is of two answers"):
        take_labels(tmp_path, ROWS, PAIRS, given)
    given.write_text(other + label(0, "Ann", [1, 2]) + label(1, "Bob", [2, 1]))
    own.write_text(label(0, "Ann", [2, 1]))
    for _ in range(2):
        take_labels(tmp_path, ROWS, PAIRS, given)
        assert people_verdicts(tmp_path, ROWS, PAIRS)[:2] == [(0.0, False), (1.0, False)], "Ann's own word stays"
    assert len(own.read_text().splitlines()) == 2


def test_what_people_say_now_is_not_written_beside_the_page(tmp_path: Path) -> None:
    (tmp_path / "given.jsonl").write_text(label(0, "Ann", [1, 2]))
    refused = pytest.raises(ValueError, match=r"judged-people\.jsonl is in use by process")
    with held(labels_file(tmp_path, PEOPLE)), refused:  # as by `arena`
        take_labels(tmp_path, ROWS, PAIRS, tmp_path / "given.jsonl")
    assert not labels_file(tmp_path, PEOPLE).exists()


def test_a_scale_has_a_mean_with_an_interval_over_prompts() -> None:
    given = [4, 6, 5, 7]
    votes = votes_of(*((n // 2, "Ann", 1.0, {"quality": value}, {}, False) for n, value in enumerate(given)))
    results = people_results(votes, {("ppo", "sft"): {}})
    assert results is not None
    # Two prompts of mean 5 and 6: the variance of their mean is (0.5^2 + 0.5^2) / 2 / (2 - 1).
    quality = results["sheet"]["ppo"]["quality"]
    assert (quality["mean"], quality["prompts"]) == (5.5, 2) and "sft" not in results["sheet"]
    assert quality["high"] - quality["mean"] == pytest.approx(1.96 * 0.25**0.5, abs=1e-3)


def test_the_interval_of_one_person_is_of_prompts_and_of_several_who_differ_wider() -> None:
    rng = np.random.default_rng(0)

    def interval(taste: list[float], each: int = 60) -> tuple[tuple[float, float], tuple[float, float]]:
        votes = votes_of(
            *(
                (n, f"p{person}", float(rng.random() < share))
                for person, share in enumerate(taste)
                for n in range(person * each, (person + 1) * each)
            )
        )
        rate = votes["preferred"].mean()
        plain = mean_rate(votes["preferred"].to_numpy())
        found = people_interval(rate, votes["preferred"].to_numpy(), votes["prompt"].to_numpy(), votes)
        return found, (plain["low"], plain["high"])

    one, plain = interval([0.7])
    assert one == pytest.approx(plain)
    alike, plain = interval([0.7] * 4)
    assert (alike[1] - alike[0]) < 1.5 * (plain[1] - plain[0])
    apart, plain = interval([0.5, 0.9] * 2)
    assert (apart[1] - apart[0]) > 2 * (plain[1] - plain[0])


def test_the_interval_holds_the_truth_over_people_and_prompts() -> None:
    """Ten people of tastes that vary, some pairs judged by several: the truth is in nine of ten intervals or more."""
    rng, inside, runs = np.random.default_rng(0), 0, 60
    for _ in range(runs):
        taste = rng.normal(0, 0.5, 10)
        votes = []
        for pair in range(100):
            lean = rng.normal(0.6, 1.0)
            for person in rng.choice(10, 3 if pair < 20 else 1, replace=False):
                votes.append((pair, f"p{person}", float(rng.random() < 1 / (1 + np.exp(-lean - taste[person])))))
        frame = votes_of(*votes)
        pairs = frame.groupby("pair")["preferred"].mean()
        rate = float(pairs.mean())
        low, high = people_interval(rate, pairs.to_numpy(), pairs.index.to_numpy(), frame)
        inside += low <= 0.618 <= high
    assert inside / runs >= 0.9


def test_strengths_are_log_odds_and_go_through_a_third_model() -> None:
    """sft beats base on 3 of 4, ppo beats sft on 3 of 4: ppo beats base by twice the log odds of 3."""
    rows = []
    for name, other in (("base", "sft"), ("ppo", "sft")):
        wins = [1.0, 1.0, 1.0, 0.0] if name == "ppo" else [0.0, 0.0, 0.0, 1.0]
        rows += [(name, other, n, n, "Ann", wins[n % 4], {}, {}, False) for n in range(400)]
    found = strengths(pd.DataFrame(rows, columns=COLUMNS))
    assert list(found) == ["sft", "base", "ppo"] and found["sft"]["strength"] == 0
    assert found["ppo"]["strength"] == pytest.approx(np.log(3), abs=0.01)
    assert found["base"]["strength"] == pytest.approx(-np.log(3), abs=0.01)
    # The logit's standard error of n wins and losses: 1 / sqrt(n p (1 - p)).
    half = found["ppo"]["high"] - found["ppo"]["strength"]
    assert half == pytest.approx(1.96 / np.sqrt(400 * 3 / 16), rel=0.02)


def test_agreement_is_of_pairs_on_which_both_have_a_preference() -> None:
    votes = votes_of(
        (0, "Ann", 1.0), (0, "Bob", 1.0), (1, "Ann", 0.0), (1, "Bob", 1.0), (2, "Ann", 0.5), (3, "Ann", 0.0)
    )
    said = {
        "gold": [(1.0, False), (1.0, False), (1.0, False), (0.7, False)],
        "judge": [None, None, (0.0, False), (0.5, True)],
    }
    found = agreement(votes, {("ppo", "sft"): said})
    # Ann and Bob agree on the first pair and not on the second, on which people together have no preference.
    assert {name: (rate["rate"], rate["prompts"]) for name, rate in found.items()} == {
        PEOPLE: (0.5, 2),
        "gold": (0.5, 2),
    }
