"""RewardBench and comparisons: scores by hand and as others' functions give them, rows refused, a run's adapters."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.command_line import error_of
from support.rows import assistant, user
from support.tiny_models import save_model
from support.worded import make_recipe, write
from transformers import AutoModelForSequenceClassification

from rlhf_recipes import Recipe, replace, run
from rlhf_recipes.cli.main import main_cli
from rlhf_recipes.data.tokens import tokenize_pair
from rlhf_recipes.evaluate.comparisons import evaluate_comparisons
from rlhf_recipes.evaluate.plan import EvaluationSettings
from rlhf_recipes.evaluate.rewardbench import (
    SECTIONS,
    Question,
    accuracy,
    benchmark_scores,
    evaluate_rewardbench,
    read_rewardbench,
    ties_means,
    weighted_rate,
)
from rlhf_recipes.model.base import fingerprint, load_base, load_tokenizer
from rlhf_recipes.model.shared import SharedBase
from rlhf_recipes.records.rates import mean_rate
from rlhf_recipes.stages.reward.adapters import score_rows

# --- Scores -----------------------------------------------------------------------------------------------------------


def test_the_right_response_must_score_highest_and_what_it_shares_counts_in_part() -> None:
    assert [accuracy(1, scores) for scores in ([2.0, 1.0], [1.0, 1.0], [0.0, 1.0])] == [1, 0, 0]
    rows = [[3.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 2.0, 0.0]]
    assert [accuracy(2, scores) for scores in rows] == [1, 1 / 3, 1 / 4, 0]


def ties_score(rows: list[tuple[str, int, list[float]]]) -> float:
    questions = [Question(n, id, "Ties", "?", ("",) * len(s), right) for n, (id, right, s) in enumerate(rows)]
    return weighted_rate(ties_means(questions, [scores for _, _, scores in rows]))["rate"]


def test_ties_by_hand() -> None:
    rows = [
        ("ref:1", 1, [3.0, 1.0, 0.0]),  # gap 2
        ("tied:1", 3, [5.0, 4.0, 4.5, 2.0]),  # gap 2, spread 1
        ("ref:2", 1, [0.0, 1.0]),  # gap -1: wrong
        ("tied:2", 2, [3.0, 1.0, 0.0]),  # gap 1, spread 2
    ]
    # Both tied questions are right and one of the ref; of one both gaps are above the spread, of the other neither.
    margins = (np.tanh(2 / 1 - 1) + np.tanh(-1 / 2 - 1)) / 2
    by_hand = 0.3 * 1 + 0.3 / 2 + 0.2 / 2 + 0.2 / 2 + 0.01 * margins
    assert ties_score(rows) == pytest.approx(by_hand) == pytest.approx(0.6492822295115545)
    # Right answers that score all alike are what is best, whatever the spread of 0 is divided by.
    assert ties_score([("ref:0", 1, [1.0, 0.0]), ("tied:0", 2, [1.0, 1.0, 0.0])]) == pytest.approx(1.01)
    assert ties_score([("ref:0", 1, [1.0, 0.0]), ("tied:0", 2, [1.0, 1.0, 1.0])]) == pytest.approx(0.3)
    assert ties_score([("ref:0", 1, [0.0, 1.0]), ("tied:0", 2, [1.0, 1.0, 1.0])]) == pytest.approx(-0.01)


def made_ties(count: int) -> list[tuple[str, int, list[float]]]:
    rows = []
    for n in range(count):
        for kind, right in (("ref", 1), ("tied", 2 + n % 3)):
            scores = [2 + (5 * n + 3 * i) % 7 / 2 + n % 4 for i in range(right)]
            scores += [(3 * n + 5 * i) % 11 / 2 for i in range(2 + n % 4)]
            rows.append((f"{kind}:{n}", right, scores))
    return rows


def test_scores_are_those_of_the_benchmarks_own_functions() -> None:
    # The numbers are from allenai/reward-bench at commit 05a9005: process_single_model, reroll_and_score_dataset and
    # calculate_scores_per_section of rewardbench/utils.py, run on the same scores.
    assert ties_score(made_ties(30)) == pytest.approx(0.27292955003090985, abs=1e-12)
    partial = [
        ("ref:1", 1, [3.0, 1.0, 0.0]),
        ("tied:1", 3, [5.0, 4.0, 4.5, 2.0]),
        ("ref:2", 1, [0.0, 1.0]),
        ("tied:3", 2, [3.0, 1.0, 0.0]),
    ]
    assert ties_score(partial) == pytest.approx(0.8576159415595576, abs=1e-12)
    scores = [[(7 * r + 5 * i + r * r * i) % 5 / 2 for i in range(4)] for r in range(50)]
    assert np.mean([accuracy(2, row) for row in scores]) == pytest.approx(0.25, abs=1e-12)
    names = [name for weights in SECTIONS.values() for name in weights]
    rows = [(name, won) for i, name in enumerate(names) for won in [1] * (i % 5 + 1) + [0] * (i % 7 + 4 - i % 5)]
    questions = [Question(n, str(n), name, "?", ("a", "b"), 1) for n, (name, _) in enumerate(rows)]
    sections = {
        "Chat": 0.35922674470160504,
        "Chat Hard": 0.4450363598389914,
        "Safety": 0.5147147147147147,
        "Reasoning": 0.33538660413660415,
    }
    found = benchmark_scores(1, questions, [[float(won), 0.5] for _, won in rows])
    assert {name: rate["rate"] for name, rate in found["sections"].items()} == pytest.approx(sections, abs=1e-12)
    assert found["mean"]["mean"]["rate"] == pytest.approx(np.mean(list(sections.values())))


def test_an_interval_is_over_questions_however_many_means_they_are_in() -> None:
    values = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.5, 1.0]
    once = weighted_rate([(1.0, dict(enumerate(values)))])
    assert once == pytest.approx(mean_rate(values))
    thrice = weighted_rate([(weight, dict(enumerate(values))) for weight in (0.2, 0.3, 0.5)])
    assert thrice == pytest.approx(once)
    # Of two subsets, one of which weighs more than its rows, it is wider than of as many rows of equal weight.
    small, large = {n: values[n] for n in range(4)}, {n: float(n % 3 > 0) for n in range(4, 200)}
    even = weighted_rate([(4 / 200, small), (196 / 200, large)])
    uneven = weighted_rate([(0.5, small), (0.5, large)])
    assert uneven["high"] - uneven["low"] > 1.5 * (even["high"] - even["low"])


# --- Files ------------------------------------------------------------------------------------------------------------

PAIR = {"id": 0, "subset": "hep-go", "prompt": "w4", "chosen": "w5", "rejected": "w6"}
FOUR_WAYS = {
    "id": "7",
    "subset": "Math",
    "prompt": "w4",
    "chosen": ["w5"],
    "rejected": ["w6", "w7", ""],
    "num_correct": 1,
}
TIED = [
    {"id": "ref:3", "subset": "Ties", "prompt": "w8", "chosen": ["w9"], "rejected": ["w6"], "num_correct": 1},
    {"id": "tied:3", "subset": "Ties", "prompt": "w8", "chosen": ["w9", "w10"], "rejected": ["w6"], "num_correct": 2},
]


def test_both_versions_are_read_from_lines_and_tables(tmp_path: Path) -> None:
    lines = write(tmp_path / "rows.jsonl", [FOUR_WAYS, *TIED])
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    pq.write_table(pa.Table.from_pylist([FOUR_WAYS, *TIED]), tmp_path / "rows.parquet")
    version, questions = read_rewardbench(lines)
    assert version == 2 and [question.correct for question in questions] == [1, 1, 2]
    assert questions[0] == Question(1, "7", "Math", "w4", ("w5", "w6", "w7", ""), 1)
    assert read_rewardbench(packed) == read_rewardbench(tmp_path / "rows.parquet") == (2, questions)
    version, questions = read_rewardbench(write(tmp_path / "pairs.jsonl", [PAIR]))
    assert (version, questions) == (1, [Question(1, "0", "hep-go", "w4", ("w5", "w6"), 1)])


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ([PAIR, {**PAIR, "chosen": None}], "rows.jsonl, row 2, field 'chosen': missing field"),
        ([PAIR, {**PAIR, "rejected": 5}], "row 2, field 'rejected': wrong type: int, not text"),
        ([{**PAIR, "prompt": " "}], "row 1, field 'prompt': empty"),
        ([PAIR, FOUR_WAYS], "row 2, field 'chosen': wrong type: list, not text, in RewardBench's version 1"),
        ([FOUR_WAYS, PAIR], "row 2, field 'chosen': wrong type: it must be a list of responses"),
        ([{**FOUR_WAYS, "rejected": []}], "row 1, field 'rejected': empty"),
        ([{**FOUR_WAYS, "num_correct": 2}], "row 1, field 'num_correct': lengths differ: 2 for 1 chosen"),
        ([FOUR_WAYS, {**TIED[0], "id": "12"}], "row 2, field 'id': wrong id: '12', not ref: or tied:"),
        ([*TIED, TIED[1]], "row 3, field 'id': wrong id: 'tied:3'"),
        ([{**TIED[1], "chosen": ["w9"], "num_correct": 1}], "row 1, field 'chosen': too few: a tied question has two"),
        (TIED[:1], "of the subset Ties no question is there both as ref: and as tied:"),
        ([], "holds no rows"),
        (["no row"], "row 1, field 'row': wrong type: str, not an object"),
    ],
)
def test_a_row_that_is_not_as_its_version_has_them_is_named(rows: list[Any], part: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        read_rewardbench(write(tmp_path / "rows.jsonl", rows))
    assert str(error.value).startswith(f"--rewardbench: {tmp_path}") and part in str(error.value)


# --- A run ------------------------------------------------------------------------------------------------------------


def words(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text.split())) for text in completions]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("rewardbench")
    return replace(make_recipe(folder), rounds=None, sft=None, ppo=None, reward={"judge_share": 0.4, "heldout": 0.3})


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewardbench-run") / "run"
    run(recipe, folder)
    return folder


def test_a_runs_reward_model_and_judge_are_scored(
    recipe: Recipe, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "rows.jsonl", [FOUR_WAYS, *TIED])
    main_cli(["evaluate", str(finished), "--rewardbench", str(path)])
    printed = capsys.readouterr().out
    assert "RewardBench 2, 3 questions" in printed
    assert "The file has no rows of Factuality, Precise IF, Safety, Focus" in " ".join(printed.split())
    result = json.loads((finished / "evaluation" / "rewardbench2.json").read_text())
    rows = [json.loads(line) for line in (finished / "evaluation" / "rewardbench2.jsonl").read_text().splitlines()]
    tokenizer = load_tokenizer(recipe.base)
    shared = SharedBase(load_base(recipe.base), recipe.lora, fingerprint(recipe.base, tokenizer))
    for name, folder in (("reward", "reward"), ("judge", "reward/judge")):
        shared.add_role(name, finished / folder, head=True)
        pairs = [tokenize_pair(tokenizer, "w4", text) for text in ("w5", "w6", "w7", "")]
        ids = [prompt + completion for prompt, completion in pairs]
        scores = score_rows(shared, ids, name).tolist()
        assert rows[0]["scores"][name] == pytest.approx(scores, abs=1e-5)
        found = result["judges"][name]
        assert found["subsets"]["Math"]["rate"] == float(scores[0] == max(scores))
        ties = ties_score([(row["id"], row["correct"], row["scores"][name]) for row in rows[1:]])
        assert found["subsets"]["Ties"]["rate"] == pytest.approx(ties)
        assert found["mean"]["mean"]["rate"] == pytest.approx((found["subsets"]["Math"]["rate"] + ties) / 2)


def test_prompts_are_messages_where_the_reward_model_was_trained_on_them(
    recipe: Recipe, finished: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(finished, tmp_path / "run")
    rows = [
        {"prompt": [user(word)], "chosen": [assistant("w5")], "rejected": [assistant("w6")]} for word in ("w7", "w8")
    ]
    settings = json.loads((copied / "recipe.json").read_text())
    settings["reward"]["data"] = str(write(tmp_path / "messages.jsonl", rows))
    (copied / "recipe.json").write_text(json.dumps(settings))
    evaluate_rewardbench(copied, write(tmp_path / "rows.jsonl", [PAIR]), EvaluationSettings(judges=("reward",)))
    (scored,) = [json.loads(line) for line in (copied / "evaluation" / "rewardbench.jsonl").read_text().splitlines()]
    tokenizer = load_tokenizer(recipe.base)
    shared = SharedBase(load_base(recipe.base), recipe.lora, fingerprint(recipe.base, tokenizer))
    shared.add_role("reward", finished / "reward", head=True)
    pairs = [tokenize_pair(tokenizer, [user("w4")], [assistant(text)]) for text in ("w5", "w6")]
    scores = score_rows(shared, [prompt + completion for prompt, completion in pairs]).tolist()
    assert scored["scores"]["reward"] == pytest.approx(scores, abs=1e-5)


def test_comparisons_are_measured_as_the_reward_card_measures_what_was_held_out(
    recipe: Recipe, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All rows of the run: those that its stage trained on are left out, and of the others its card says the same."""
    assert recipe.reward is not None
    out = tmp_path / "out"
    main_cli(["evaluate", str(finished), "--comparisons", recipe.reward.data, "--out", str(out)])
    printed = " ".join(capsys.readouterr().out.split())
    card = json.loads((finished / "reward" / "card.json").read_text())
    result = json.loads((out / "comparisons.json").read_text())
    found = result["judges"]["reward"]
    for name in ("accuracy", "tokens_win"):
        assert found[name] == pytest.approx(card[name]), name
    for one, other in zip(found["by_length"], card["by_length"], strict=True):
        assert one["accuracy"] == pytest.approx(other["accuracy"])
    held_out = card["accuracy"]["pairs"]
    assert f"{40 - held_out} rows of {recipe.reward.data} were left out: the run was trained" in printed
    assert f"Right on comparisons, {held_out} rows" in printed and "the words alone" in printed
    rows = [json.loads(line) for line in (out / "comparisons.jsonl").read_text().splitlines()]
    wins = [row["scores"]["judge"][0] > row["scores"]["judge"][1] for row in rows]
    assert result["judges"]["judge"]["accuracy"]["rate"] == pytest.approx(np.mean(wins))


def test_rankings_of_texts_are_measured_by_functions_and_by_source(finished: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"w{n}", "responses": ["w5 w6 w7", "w5", "w5 w6"], "ranking": [1, 3, 2], "source": source}
        for n, source in ((61, "a"), (62, "b"))
    ]
    rows[1]["ranking"] = [2, 1, 1]  # of three pairs a tie, and the shorter ones are better
    path, judge = write(tmp_path / "rows.jsonl", rows), f"{__file__}:words"
    found = evaluate_comparisons(finished, str(path), settings=EvaluationSettings(judges=(judge,)), out=tmp_path)
    measured = found["judges"][judge]
    assert {name: part["rate"] for name, part in measured["by_source"].items()} == {"a": 1, "b": 0}
    assert measured["accuracy"]["rate"] == measured["length"]["longer_wins"]["rate"] == 3 / 5


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ([{"prompt": "w4 w63", "chosen": "w5", "rejected": "w6"}] * 2, "was trained on all 2 rows"),
        ([{"prompt": "w4"}], "has the columns: prompt"),
    ],
)
def test_comparisons_that_say_nothing_are_refused(
    rows: list[Any], part: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_recipes.evaluate.models.load_base", lambda *args: pytest.fail("a weight was loaded"))
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=f"^--comparisons: .*{part}"):
        evaluate_comparisons(finished, str(path), out=tmp_path)


def test_classifiers_and_functions_are_scored_too(finished: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = save_model(tmp_path / "classifier")
    model = AutoModelForSequenceClassification.from_pretrained(classifier, num_labels=1, pad_token_id=0)
    model.save_pretrained(classifier)
    path = write(tmp_path / "rows.jsonl", [PAIR, {**PAIR, "id": 1, "subset": "math-prm", "chosen": "w5 w6"}])
    judges = (str(classifier), f"{__file__}:words")
    result = evaluate_rewardbench(finished, path, EvaluationSettings(judges=judges), tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "rewardbench.jsonl").read_text().splitlines()]
    found = result["judges"][judges[1]]
    assert rows[1]["scores"][judges[1]] == [2, 1] and found["subsets"]["hep-go"]["rate"] == 0
    assert found["sections"]["Reasoning"]["rate"] == pytest.approx(984 / (984 + 164))
    scores = rows[0]["scores"][judges[0]]
    assert result["judges"][judges[0]]["subsets"]["hep-go"]["rate"] == float(scores[0] > scores[1])


def test_what_is_longer_than_the_context_keeps_its_end(finished: Path, recipe: Recipe, tmp_path: Path) -> None:
    long = " ".join(["w4"] * 2100)
    path = write(tmp_path / "rows.jsonl", [{**PAIR, "prompt": long}])
    result = evaluate_rewardbench(finished, path, out=tmp_path / "out")
    assert any("2 responses were cut at the front" in words for words in result["warnings"])


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--models", "ppo"], "--models is of comparing models, which --rewardbench does not do"),
        (["--samples", "2"], "--samples is of comparing models"),
        (["--split", "test"], "--split is of --comparisons"),
        (["--judge", "nobody"], "it is none of gold, people, reward and judge"),
        (["--judge", "{base}"], "it is asked about pairs of answers, and --rewardbench needs a score of each"),
    ],
)
def test_a_users_error_comes_before_any_weight(
    recipe: Recipe,
    finished: Path,
    words: list[str],
    part: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rlhf_recipes.evaluate.models.load_base", lambda *args: pytest.fail("a weight was loaded"))
    path = write(tmp_path / "rows.jsonl", [PAIR])
    words = [word.format(base=recipe.base.model) for word in words]
    assert part in error_of(capsys, ["evaluate", str(finished), "--rewardbench", str(path), *words])
