"""What is said of labelers is true of them: by hand, by the libraries, and where the truth is known by simulation."""

import io
import json
from itertools import combinations, product
from pathlib import Path
from typing import Any

import krippendorff
import numpy as np
import pytest
import torch
from datasets import Dataset
from rich.console import Console
from sklearn.metrics import cohen_kappa_score
from support.command_line import error_of
from support.tiny_models import make_tokenizer, save_model
from transformers import AutoModelForSequenceClassification

from rlhf_recipes.cli.main import main_cli
from rlhf_recipes.data.prepare import prepare
from rlhf_recipes.feedback.agreement import agreement_report
from rlhf_recipes.feedback.agreement_tables import show_agreement
from rlhf_recipes.feedback.agreement_warnings import differs
from rlhf_recipes.feedback.habits import run_chance
from rlhf_recipes.feedback.pairs import (
    alpha_disagreements,
    coefficient_interval,
    kappa_disagreements,
    pair_lines,
    share_with_interval,
)
from rlhf_recipes.feedback.rows import read_judgements
from rlhf_recipes.feedback.worth import LEAST_SIGNAL, merge_judgements
from rlhf_recipes.recipe.values import Stage
from rlhf_recipes.records.rates import interval, mean_rate
from rlhf_recipes.stages.options import RewardConfig
from rlhf_recipes.stages.reward.trainer import RewardTrainer

# crowd-kit says what pandas 4 will no longer know.
pytestmark = pytest.mark.filterwarnings("ignore:The (inplace|copy) keyword:DeprecationWarning")

Row = dict[str, Any]
RANKINGS = {1: [1, 2], 0: [1, 1], -1: [2, 1]}  # of two responses, by choice


def label(id: str, ranking: list[int], labeler: str, **more: Any) -> Row:
    responses = [f"w{4 + i}" for i in range(len(ranking))]
    return {"id": id, "prompt": id, "responses": responses, "ranking": ranking, "labeler": labeler, **more}


def two_by_two(choices: dict[str, list[int]]) -> list[Row]:
    """Judgements of two responses, by each labeler's choices of the prompts p0, p1, ..."""
    return [label(f"p{i}", RANKINGS[c], name) for name, of in choices.items() for i, c in enumerate(of)]


def simulated(accuracies: dict[str, float], prompts: int, judges: int = 0, ties: float = 0.0) -> list[Row]:
    """Labelers of two responses who are right with these probabilities; `judges` of them for a prompt (0: all)."""
    rng, rows = np.random.default_rng(0), []
    for i in range(prompts):
        truth = int(rng.choice([-1, 0, 1], p=[(1 - ties) / 2, ties, (1 - ties) / 2]))
        for name in rng.choice(list(accuracies), judges or len(accuracies), replace=False):
            wrong = int(rng.choice([choice for choice in (-1, 0, 1) if choice != truth and (choice or ties)]))
            choice = truth if rng.random() < accuracies[name] else wrong
            rows.append(label(f"p{i}", RANKINGS[choice], str(name), truth=truth))
    return rows


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Agreement

# Both choose +, 0 and - five, two and three times of ten; they agree on 4 + 1 + 2.
ANNA = [1, 1, 1, 1, 1, 0, 0, -1, -1, -1]
BOB = [1, 1, 1, 1, 0, 0, -1, 1, -1, -1]


def test_kappa_and_alpha_by_hand_with_ties() -> None:
    found = agreement_report(two_by_two({"anna": ANNA, "bob": BOB})).numbers
    by_chance = 0.5**2 + 0.2**2 + 0.3**2
    assert found["between"][0]["agreement"]["rate"] == found["agreement"]["rate"] == pytest.approx(0.7)
    assert found["between"][0]["kappa"]["kappa"] == pytest.approx((0.7 - by_chance) / (1 - by_chance))
    # Of the twenty choices 6 are -, 4 are 0, 10 are +: their middles lie at 3, 8 and 15. The choices differ thrice.
    observed = 2 * (7**2 + 5**2 + 12**2)
    expected = 2 * (6 * 4 * 5**2 + 4 * 10 * 7**2 + 6 * 10 * 12**2) / 19
    assert found["alpha"]["alpha"] == pytest.approx(1 - observed / expected)
    for one in (found["alpha"], found["between"][0]["kappa"], found["agreement"]):
        assert one["low"] < 0.68 < one["high"]


def test_a_ranking_is_its_pairs_with_ties() -> None:
    rows = [label("p", [1, 2, 2], "anna", order=[2, 0, 1]), label("p", [3, 1, 2], "bob")]
    rows[0]["responses"] = rows[1]["responses"] = ["long one", "short", "shorty"]
    lines = pair_lines(rows, ["anna", "bob"])
    assert lines["choice"].tolist() == [1, 1, 0, -1, -1, 1]  # (1, 2), (1, 3), (2, 3) of each
    assert lines["shown"].tolist() == [1, -1, -1, 0, 0, 0]  # the third was shown first, then the first
    assert lines["longer"].tolist() == [1, 1, -1] * 2
    found = agreement_report(rows).numbers
    assert found["agreement"]["rate"] == 0 and found["agreement"]["pairs"] == 3 and found["agreement"]["prompts"] == 1


def coefficient(disagreements: Any) -> float:
    (observed,), (expected,) = disagreements
    return 1 - observed / expected


def test_intervals_are_of_the_numbers_that_the_libraries_give() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        values = rng.integers(-1, 2, (4, 30)).astype(float)
        values[:, :15] = values[0, :15]  # some agreement
        table = np.zeros((3, 3))
        np.add.at(table, (values[0].astype(int) + 1, values[1].astype(int) + 1), 1)
        kappa = cohen_kappa_score(*values[:2].astype(int))
        assert coefficient(kappa_disagreements(table[None])) == pytest.approx(kappa)
        values[rng.random(values.shape) < 0.3] = np.nan
        counts = (values.T[:, :, None] == [-1, 0, 1]).sum(1)
        counts = counts[counts.sum(1) > 1].astype(float)
        products = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(3)
        coincidences = (products / (counts.sum(1) - 1)[:, None, None]).sum(0)
        theirs = krippendorff.alpha(values, level_of_measurement="ordinal")
        assert coefficient(alpha_disagreements(coincidences[None])) == pytest.approx(theirs)


@pytest.mark.parametrize("prompts", [20, 100])
@pytest.mark.parametrize("right", [0.7, 0.9, 0.98])
def test_a_coefficients_interval_holds_the_truth_as_often_as_it_says(prompts: int, right: float) -> None:
    """Two labelers who see the truth, which is even, in so many cases, and on three pairs of a prompt err together."""
    rng, agree = np.random.default_rng(1), right**2 + (1 - right) ** 2
    inside = []
    for _ in range(150):
        truth, alike = rng.integers(0, 2, (2, prompts, 3)), rng.random((2, prompts, 1)) < 0.5
        alone, together = rng.random((2, prompts, 3)) < right, rng.random((2, prompts, 1)) < right
        seen = np.where(np.where(alike, together, alone), truth[0], 1 - truth[0])  # (2, prompts, 3)
        tables = np.zeros((prompts, 3, 3))
        np.add.at(tables, (np.repeat(np.arange(prompts), 3), 2 * seen[0].reshape(-1), 2 * seen[1].reshape(-1)), 1)
        found = coefficient_interval(tables, kappa_disagreements)
        inside.append(found["low"] <= 2 * agree - 1 <= found["high"])
    assert np.mean(inside) >= 0.93


def test_of_many_labelers_none_is_suspected_by_chance() -> None:
    rng, alarms = np.random.default_rng(0), {1: [], 20: []}
    for many, found in alarms.items():
        for _ in range(100):
            shares = [mean_rate(rng.random(100).round(), np.arange(100)) for _ in range(many)]
            found.append(any(differs(share, 0.5, many) for share in shares))
    assert all(np.mean(found) <= 0.07 for found in alarms.values()), alarms
    assert differs(mean_rate(np.arange(100) < 75, np.arange(100)), 0.5, 20), "it has power"


def test_the_majority_is_of_the_others() -> None:
    rows = two_by_two({"a": [1, 1, 1, 0], "b": [1, 1, 1, -1], "c": [1, -1, 0, 1]})
    found = agreement_report(rows).numbers["labelers"]
    # a: with b = c on p0 alone; on p1, p2 and p3 the two others differ, and there is no majority.
    assert found["a"]["majority"]["rate"] == 1 and found["a"]["majority"]["pairs"] == 1
    assert found["c"]["majority"]["rate"] == pytest.approx(1 / 3) and found["c"]["majority"]["pairs"] == 3


def test_nobody_disagrees() -> None:
    found = agreement_report(two_by_two({"a": [1] * 30, "b": [1] * 30, "c": [1] * 30})).numbers
    assert found["agreement"]["rate"] == 1
    assert found["alpha"] is None and all(pair["kappa"] is None for pair in found["between"])
    assert {own["weight"] for own in found["labelers"].values()} == {1.0}
    assert found["between"][0]["agreement"]["low"] == interval(1, 30)[0]


def test_ten_prompts_of_agreement_are_no_certainty() -> None:
    found = agreement_report(two_by_two({"a": [1, -1] * 5, "b": [1, -1] * 5})).numbers
    kappa, alpha = found["between"][0]["kappa"], found["alpha"]
    assert kappa["kappa"] == alpha["alpha"] == kappa["high"] == alpha["high"] == 1
    # 10 of 10 are 68 to 100 %, and half of the pairs would agree by chance (of 20 choices, 10 in 19 by alpha).
    assert kappa["low"] == pytest.approx(1 - 0.3209 / 0.5, abs=1e-3)
    assert alpha["low"] == pytest.approx(1 - 0.3209 / (10 / 19), abs=1e-3)


def test_a_prompt_judged_twice_by_one_labeler() -> None:
    rows = two_by_two({"a": [1, 1, -1, 0], "b": [1, -1, -1, 0]})
    again = [label("p0", [2, 1], "a", time="2026-01-02"), label("p1", [1, 2], "a", time="2026-01-02")]
    found = agreement_report(rows + again).numbers
    assert found["labelers"]["a"]["again"]["rate"] == 0.5 and found["labelers"]["a"]["again"]["pairs"] == 2
    assert found["labelers"]["b"]["again"] is None
    assert found["agreement"]["rate"] == 0.5 and found["agreement"]["pairs"] == 4, "the later one counts"
    assert found["labels"] == 10 and found["prompts"] == 4


# Each labeler


def biased(first: float, longer: float, prompts: int, seed: int) -> list[Row]:
    """Four responses; each pair's better one is drawn by place and length through a strength of each response."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(prompts):
        order, lengths = rng.permutation(4), rng.choice(np.arange(1, 50), 4, replace=False)
        score = rng.gumbel(size=4) - first * np.argsort(order) + longer * np.argsort(np.argsort(lengths))
        ranking = [1 + int((score > own).sum()) for own in score]
        rows.append(label(f"p{i}", ranking, "x", order=order.tolist()))
        rows[-1]["responses"] = ["x" * int(n) for n in lengths]
    return rows


def test_preferences_for_place_and_length_are_told_apart() -> None:
    """With Gumbel noise the one shown a place earlier wins with probability sigmoid(first): of the six pairs of four
    places three are one place apart, two are two, and one is three."""

    def expected(step: float) -> float:
        wins = [1 / (1 + np.exp(-step * apart)) for apart in (1, 1, 1, 2, 2, 3)]
        return float(np.mean(wins))

    for first, longer in ((0.0, 0.0), (0.4, 0.0), (0.0, 0.5), (-0.3, 0.0)):
        own = agreement_report(biased(first, longer, 400, seed=3)).numbers["labelers"]["x"]
        assert own["first_shown"]["low"] <= expected(first) <= own["first_shown"]["high"]
        assert own["longer"]["low"] <= expected(longer) <= own["longer"]["high"]
        warned = any(
            "shown first" in text for text in agreement_report(biased(first, longer, 400, seed=3)).numbers["warnings"]
        )
        assert warned == (first != 0)


def test_pace() -> None:
    rows = [label(f"p{i}", [1, 2], "a", seconds=s) for i, s in enumerate((1.0, 2, 30, 36, 40, 9000))]
    found = agreement_report([*rows, label("p9", [1, 2], "b")], fast=2).numbers
    assert found["labelers"]["a"]["pace"] == {"seconds": 33, "an_hour": 3600 / 33, "fast": 1 / 6}
    assert found["labelers"]["b"]["pace"] is None
    assert not any("less than" in text for text in found["warnings"])
    assert any("less than 3 seconds for 33%" in text for text in agreement_report(rows, fast=3).numbers["warnings"])
    models = agreement_report([{**row, "labeler": "judge:m"} for row in rows]).numbers
    assert not any("less than" in text for text in models["warnings"])


@pytest.mark.parametrize("places", [2, 3])
def test_the_chance_of_a_run_by_counting(places: int) -> None:
    games = list(product(range(places), repeat=6))
    for length in range(1, 7):
        held = sum(any(len({*game[i : i + length]}) == 1 for i in range(7 - length)) for game in games)
        assert run_chance(length - 1, [1 / places] * 5) == pytest.approx(held / len(games))


def test_a_streak_is_of_places_in_the_order_of_time() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(60):
        order = rng.permutation(3).tolist()
        place = 1 if 20 <= i < 35 else int(rng.integers(3))
        ranking = [2, 2, 2]
        ranking[order[place]] = 1
        rows.append(label(f"p{i}", ranking, "a", order=order, time=f"2026-01-01T00:00:{i:02d}Z"))
    rows.append(label("tied", [1, 1, 2], "a", order=[0, 1, 2], time="2026-01-01T00:00:25Z"))  # passed over
    mixed = sorted([rows[i] for i in rng.permutation(len(rows))], key=lambda row: row["time"])
    found = agreement_report(mixed).numbers
    streak = found["labelers"]["a"]["streak"]
    assert streak["place"] == 1 and 15 <= streak["length"] <= 18 and streak["chance"] < 1e-4
    assert any("at place 2" in text and "in a row" in text for text in found["warnings"])


def test_a_judge_sees_both_orders_and_has_no_place() -> None:
    rows = [{**row, "labeler": "judge:m"} for row in biased(2.0, 0.0, 30, seed=0)]
    own = agreement_report(rows).numbers["labelers"]["judge:m"]
    assert own["first_shown"] is None and own["streak"] is None and own["longer"] is not None


# Worth

TRUE = {"a": 0.9, "b": 0.8, "c": 0.73, "d": 0.73, "spam": 0.5}


@pytest.mark.parametrize("judges", [0, 3])
def test_accuracies_are_recovered_and_a_spammer_gets_next_to_nothing(judges: int) -> None:
    found = agreement_report(simulated(TRUE, 2000 if judges else 1000, judges=judges)).numbers["labelers"]
    for name, accuracy in TRUE.items():
        assert found[name]["accuracy"] == pytest.approx(accuracy, abs=0.04), name
        assert found[name]["weight"] > 0
    assert found["spam"]["weight"] < 0.2 * min(found[name]["weight"] for name in "abcd")
    ratio = found["a"]["weight"] / found["c"]["weight"]
    assert ratio == pytest.approx((2 * 0.9 - 1) / (2 * 0.73 - 1), rel=0.2)


def test_who_never_ties_and_throws_a_coin_is_known_among_ties() -> None:
    rows = simulated({"a": 0.8, "b": 0.7, "c": 0.7}, 600, ties=0.25)
    rng = np.random.default_rng(0)
    rows += [label(f"p{i}", RANKINGS[int(rng.choice([-1, 1]))], "coin") for i in range(600)]
    found = agreement_report(rows).numbers["labelers"]
    assert found["coin"]["weight"] < 0.2 * min(found[name]["weight"] for name in "abc")


def test_who_says_the_opposite_has_the_least_weight_and_is_named() -> None:
    found = agreement_report(simulated({"a": 0.8, "b": 0.8, "c": 0.8, "reversed": 0.2}, 400)).numbers
    labelers = found["labelers"]
    signals = [LEAST_SIGNAL if name == "reversed" else 2 * labelers[name]["accuracy"] - 1 for name in labelers]
    weights = [own["weight"] for own in labelers.values()]
    assert weights == pytest.approx([signal / np.mean(signals) for signal in signals])
    below = [text for text in found["warnings"] if "agrees with the majority" in text]
    assert len(below) == 1 and below[0].startswith("'reversed'")


def test_the_order_of_responses_in_the_file_decides_nothing() -> None:
    rows = simulated(TRUE, 150, ties=0.2, judges=3)
    turned = [{**row, "ranking": row["ranking"][::-1]} for row in rows]
    one, other = agreement_report(rows), agreement_report(turned)
    assert one.worth is not None and other.worth is not None
    for name, own in one.numbers["labelers"].items():
        assert other.numbers["labelers"][name]["weight"] == pytest.approx(own["weight"])
    for row, mirrored in zip(merge_judgements(rows, one.worth), merge_judgements(turned, other.worth), strict=True):
        assert mirrored["ranking"] == row["ranking"][::-1]
        assert mirrored["preferences"][0] == pytest.approx(1 - row["preferences"][0], abs=1e-5)


def test_two_labelers_weigh_the_same_and_a_few_pairs_say_little() -> None:
    found = agreement_report(two_by_two({"anna": ANNA * 10, "bob": BOB * 10})).numbers
    assert [own["weight"] for own in found["labelers"].values()] == [1, 1]
    assert any("weigh the same" in text for text in found["warnings"])
    rows = simulated({"a": 0.75, "b": 0.75, "c": 0.75}, 300)
    alike = [i for i in range(0, 900, 3) if rows[i]["ranking"] == rows[i + 1]["ranking"] == rows[i + 2]["ranking"]]
    newcomer = [{**rows[i], "labeler": "new"} for i in alike[:3]]  # right three times
    stranger = [label(f"q{i}", [1, 2], "stranger") for i in range(300)]  # shares no prompt
    found = agreement_report(rows + newcomer + stranger).numbers
    weights = {name: own["weight"] for name, own in found["labelers"].items()}
    usual = np.mean([weights[name] for name in "abc"])
    assert usual < weights["new"] < 1.4 * usual and weights["stranger"] == pytest.approx(usual, rel=0.1)
    assert any("'stranger' shares no prompt" in text for text in found["warnings"])


# What the reward stage gets


def stage(path: Path) -> Any:
    return prepare("reward", Stage(str(path), heldout=0.0, bad_rows="refuse"), make_tokenizer(), None)


def test_the_reward_stage_weighs_each_judgement_by_its_labeler(tmp_path: Path) -> None:
    found = agreement_report(simulated(TRUE, 40))
    path = tmp_path / "weighted.jsonl"
    assert found.write(path) == 200
    table = stage(path).train
    weights = {name: own["weight"] for name, own in found.numbers["labelers"].items()}
    assert table["weight"] == pytest.approx([weights[row["labeler"]] for row in found.rows])
    assert np.mean(table["weight"]) == pytest.approx(1) and min(table["weight"]) > 0
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(save_model(tmp_path / "model"), num_labels=1)
    config = RewardConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False)
    rows = table.to_list()[:10]
    trainer = RewardTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=make_tokenizer())

    def loss(rows: list[Row]) -> float:
        return trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item()

    weighted = [row["weight"] * loss([{**row, "weight": 1.0}]) for row in rows]

    assert loss(rows) == pytest.approx(np.mean(weighted), rel=1e-4)


def test_weights_of_weighted_labels_are_made_anew(tmp_path: Path) -> None:
    first = agreement_report(simulated(TRUE, 60))
    first.write(tmp_path / "one.jsonl")
    again = agreement_report(read_judgements([tmp_path / "one.jsonl"]))
    again.write(tmp_path / "two.jsonl")
    assert (tmp_path / "two.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()


def test_merged_rows_are_the_truth_more_often_than_any_labeler(tmp_path: Path) -> None:
    rows = simulated({"a": 0.75, "b": 0.75, "c": 0.75, "d": 0.75, "e": 0.75}, 400)
    found = agreement_report([*rows, label("alone", [1, 2], "a", source="web")])
    assert found.write(tmp_path / "merged.jsonl", merge=True) == 401
    merged = [json.loads(line) for line in (tmp_path / "merged.jsonl").read_text().splitlines()]
    by_id = {row["id"]: row for row in merged}
    truth = {row["id"]: row["truth"] for row in rows}
    right = np.mean([RANKINGS[truth[id]] == by_id[id]["ranking"] for id in truth])
    assert right == pytest.approx(0.896, abs=0.03)  # of five such, the majority: binomial
    # Soft labels are probabilities: those near p hold in a share p of the cases.
    soft = np.array([by_id[id]["preferences"][0] for id in truth])
    assert np.mean(np.where(soft > 0.5, soft, 1 - soft)) == pytest.approx(right, abs=0.03)
    assert by_id["alone"]["preferences"][0] == pytest.approx(0.75, abs=0.05) and by_id["alone"]["source"] == "web"
    assert by_id["p0"]["labelers"] == sorted("abcde", key=[row["labeler"] for row in rows[:5]].index)
    table = stage(tmp_path / "merged.jsonl").train
    assert list(table["preferences"]) == [row["preferences"] for row in merged]


def test_merged_rankings_have_ties_where_labelers_do_or_go_in_a_circle() -> None:
    kinds = {"same": [[1, 2, 3]] * 3, "tied": [[1, 2, 2]] * 3, "circle": [[1, 2, 3], [3, 1, 2], [2, 3, 1]]}
    rows = [label(f"{kind} {i}", ranking, name) for kind, rankings in kinds.items() for i in range(20)
            for name, ranking in zip("abc", rankings, strict=True)]  # fmt: skip
    found = agreement_report(rows)
    assert found.worth is not None
    merged = {row["id"]: row for row in merge_judgements(rows, found.worth)}
    assert merged["same 3"]["ranking"] == [1, 2, 3] and min(merged["same 3"]["preferences"]) > 0.8
    assert merged["tied 3"]["ranking"] == [1, 2, 2] and merged["tied 3"]["preferences"][2] == pytest.approx(0.5)
    assert merged["circle 3"]["ranking"] == [1, 1, 1]


# The command


def test_the_command_compares_people_and_a_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = simulated({"anna": 0.8, "bob": 0.8, "judge:m": 0.9}, 120)
    people = write(tmp_path / "people.jsonl", [row for row in rows if row["labeler"] != "judge:m"])
    judge = write(tmp_path / "judge.jsonl", [row for row in rows if row["labeler"] == "judge:m"])
    out = tmp_path / "new" / "weighted.jsonl"
    main_cli(["agreement", str(people), str(judge), "--json", "--out", str(out)])
    numbers = json.loads(capsys.readouterr().out)
    assert set(numbers["labelers"]) == {"anna", "bob", "judge:m"} and numbers["labels"] == 360
    assert {tuple(pair["labelers"]) for pair in numbers["between"]} == set(combinations(sorted(numbers["labelers"]), 2))
    assert len(stage(out).train) == 360
    main_cli(["agreement", str(people), str(judge)])
    printed = " ".join(capsys.readouterr().out.split())
    assert "360 judgements of 120 prompts" in printed and "72.6 ± 1.5 %" in printed
    assert f"agree on {numbers['agreement']['rate']:.1%}" in printed
    assert "Cohen's kappa is under 0.5: 'anna' and 'bob'" in printed


def test_names_are_only_text(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["[bold red]eve[/]", "\x1b[31mred\x07", "\ud800", "née"]
    numbers = agreement_report(simulated(dict.fromkeys(names, 0.8), 20)).numbers
    screen = io.StringIO()
    monkeypatch.setattr(
        "rlhf_recipes.feedback.agreement_tables.Console",
        lambda **options: Console(file=screen, width=300, **options),
    )
    show_agreement(numbers)
    printed = screen.getvalue()
    assert all(c.isprintable() or c == "\n" for c in printed)
    assert all(text in printed for text in ("[bold red]eve[/]", r"\x1b[31mred\x07", r"\ud800", "née"))


def test_one_labeler_is_described_and_weighs_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "labels.jsonl", biased(0.5, 0.0, 100, seed=0))
    main_cli(["agreement", str(path), "--out", str(tmp_path / "out.jsonl"), "--json"])
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["agreement"] is None and numbers["between"] == [] and numbers["labelers"]["x"]["weight"] == 1
    assert numbers["warnings"][0].startswith("There is one labeler")
    assert numbers["labelers"]["x"]["first_shown"]["low"] > 0.5
    assert set(stage(tmp_path / "out.jsonl").train["weight"]) == {1.0}
    with pytest.raises(SystemExit):
        main_cli(["agreement", str(path), "--out", str(tmp_path / "merged.jsonl"), "--merge"])
    assert "nothing to merge" in capsys.readouterr().err and not (tmp_path / "merged.jsonl").exists()


def test_labelers_who_share_nothing_are_told_how_much_to_share() -> None:
    rows = [label(f"p{i}", [1, 2], "a") for i in range(5)] + [label(f"q{i}", [1, 2], "b") for i in range(5)]
    assert "Give 100 prompts or more" in agreement_report(rows).numbers["warnings"][0]
    found = agreement_report([*rows, label("p0", [1, 2], "b")]).numbers
    assert any("1 by 'a' and 'b'" in text and "about 100" in text for text in found["warnings"])


def test_a_file_in_the_order_of_the_models_is_named_beside_a_low_kappa() -> None:
    """Labelers who are right in 85 % about a model that is better in 90 %: they agree, but kappa is low."""
    rng = np.random.default_rng(0)
    better = rng.choice([1, -1], 400, p=[0.9, 0.1])
    choices = {name: (better * rng.choice([1, -1], 400, p=[0.85, 0.15])).tolist() for name in "ab"}
    lopsided = agreement_report(two_by_two(choices)).numbers
    signs = rng.choice([1, -1], 400)
    shuffled = agreement_report(two_by_two({name: (signs * of).tolist() for name, of in choices.items()})).numbers
    assert lopsided["agreement"] == shuffled["agreement"]
    assert lopsided["between"][0]["kappa"]["kappa"] < shuffled["between"][0]["kappa"]["kappa"] - 0.1
    assert any("first in the file" in text for text in lopsided["warnings"])
    assert not any("first in the file" in text for text in shuffled["warnings"])


GOOD = label("p", [1, 2], "anna")
BAD = {
    "no labeler": ({"labeler": None}, "row 2, field 'labeler'"),
    "blank labeler": ({"labeler": " "}, "row 2, field 'labeler'"),
    "other responses": ({"responses": ["w4", "w9"]}, "row 2, field 'responses': the id 'p' is that of"),
    "other prompt": ({"prompt": "w8"}, "row 2, field 'responses': the id 'p' is that of"),
    "short order": ({"order": [0]}, "row 2, field 'order': [0] is not the responses' numbers, 0 to 1"),
    "order of another kind": ({"order": ["0", None]}, "row 2, field 'order'"),
    "seconds": ({"seconds": "5 s"}, "row 2, field 'seconds': '5 s' is no number"),
    "negative": ({"seconds": -1}, "row 2, field 'seconds'"),
    "no ranking": ({"ranking": None}, "field 'ranking': missing field"),
    "wrong ranking": ({"ranking": [1, 2, 3]}, "field 'ranking': lengths differ"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_broken_labels_are_named(tmp_path: Path, changes: Row, message: str) -> None:
    path = write(tmp_path / "labels.jsonl", [GOOD, {**GOOD, "labeler": "bob", **changes}])
    with pytest.raises(ValueError) as error:
        read_judgements([path])
    assert str(path) in str(error.value) and message in str(error.value)


def test_the_same_id_in_two_files_must_be_the_same_sample(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", [GOOD])
    other = write(tmp_path / "other.jsonl", [GOOD | {"labeler": "bob"}, GOOD | {"responses": ["w4", "w7"]}])
    with pytest.raises(ValueError, match=r"other\.jsonl, row 2.* is that of .*one\.jsonl, row 1 as well"):
        read_judgements([one, other])


def test_what_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(tmp_path / "labels.jsonl", [GOOD]))
    assert "there is no file" in error_of(capsys, ["agreement", str(tmp_path / "none.jsonl")])
    assert "--out" in error_of(capsys, ["agreement", path, "--merge"])
    assert "must end in .jsonl" in error_of(capsys, ["agreement", path, "--out", str(tmp_path / "out.json")])
    assert "is one of the files" in error_of(capsys, ["agreement", path, "--out", path])
    skipped = write(tmp_path / "skipped.jsonl", [{"id": "p", "labeler": "anna", "skipped": True}])
    assert "id, labeler, skipped" in error_of(capsys, ["agreement", str(skipped)])


def test_a_share_has_the_interval_of_a_rate_over_prompts() -> None:
    lines = pair_lines([label(f"p{i}", [1, 2], "a") for i in range(8)], ["a"])
    found = share_with_interval(lines, np.arange(8) < 6)
    assert found is not None and (found["prompts"], found["pairs"]) == (8, 8)
    assert found == {**mean_rate(np.arange(8) < 6, np.arange(8)), "pairs": 8}
