"""Reward models from rankings: the loss by hand and against TRL's, the rows, ensembles, and a whole stage."""

import csv
import dataclasses
import itertools
import json
import math
import random
import shutil
from math import exp, log
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from support.tiny_models import make_tokenizer, save_model
from transformers import AutoModelForSequenceClassification

from rlhf_recipes import Base, Lora, Recipe, Stage, replace, run
from rlhf_recipes.data.prepare import merge_comparisons, prepare
from rlhf_recipes.data.split import set_aside
from rlhf_recipes.model.base import load_base, load_tokenizer
from rlhf_recipes.model.shared import BIAS, SharedBase
from rlhf_recipes.stages.options import RewardConfig
from rlhf_recipes.stages.reward.adapters import (
    add_reward_roles,
    check_probes,
    judge_folder,
    member_folders,
    score_rows,
    set_bias,
)
from rlhf_recipes.stages.reward.baseline import token_scores
from rlhf_recipes.stages.reward.loss import fold, ranking_loss, stack_preferences, untied
from rlhf_recipes.stages.reward.stage import comparisons, count_pairs
from rlhf_recipes.stages.reward.trainer import RewardTrainer

WEIGHTS = "adapter_model.safetensors"


def softplus(x: float) -> float:
    """-log sigma(-x)."""
    return log(1 + exp(x))


# --- The loss by hand -------------------------------------------------------------------------------------------------


def test_four_responses_with_a_tie_by_hand() -> None:
    scores, ranking = torch.tensor([[2.0, 1.0, 0.5, -1.0]]), torch.tensor([[1, 2, 2, 4]])
    untied_pairs = softplus(-1.0) + softplus(-1.5) + softplus(-3.0) + softplus(-2.0) + softplus(-1.5)
    tie = 0.5 * softplus(-0.5) + 0.5 * softplus(0.5)
    assert ranking_loss(scores, ranking).item() == pytest.approx((untied_pairs + tie) / 6)


def test_margin_smoothing_and_centering_by_hand() -> None:
    scores, ranking = torch.tensor([[0.5, 2.0, 2.5]]), torch.tensor([[2, 1, 1]])
    found = ranking_loss(scores, ranking, torch.tensor([0.25]), label_smoothing=0.1, center_coefficient=0.01)
    first = 0.9 * softplus(-1.25) + 0.1 * softplus(1.25)  # 2.0 over 0.5, less the margin
    second = 0.9 * softplus(-1.75) + 0.1 * softplus(1.75)  # 2.5 over 0.5
    tie = 0.5 * softplus(-0.5) + 0.5 * softplus(0.5)  # neither a margin nor smoothing
    squares = 0.01 * (2.5**2 + 3.0**2 + 4.5**2)
    assert found.item() == pytest.approx((first + second + tie + squares) / 3)


def test_soft_labels_by_hand() -> None:
    scores, ranking = torch.tensor([[0.5, 2.0, 2.5]]), torch.tensor([[2, 1, 2]])
    preferences = torch.full((1, 3, 3), math.nan)
    preferences[0, 0, 1], preferences[0, 0, 2] = 0.3, 0.6  # of the last pair nothing is known but its ranks
    found = ranking_loss(scores, ranking, label_smoothing=0.1, preferences=preferences)
    first = 0.3 * softplus(1.5) + 0.7 * softplus(-1.5)  # 0.5 against 2.0
    second = 0.6 * softplus(2.0) + 0.4 * softplus(-2.0)  # 0.5 against 2.5: a tie by rank
    third = 0.9 * softplus(0.5) + 0.1 * softplus(-0.5)  # 2.0 over 2.5
    assert found.item() == pytest.approx((first + second + third) / 3)


def test_certain_soft_labels_are_hard_ones() -> None:
    torch.manual_seed(0)
    scores, ranking = torch.randn(6, 4), torch.stack([torch.randint(1, 5, (4,)) for _ in range(6)])
    rows = [{"ranking": ranks, "preferences": certain(ranks)} for ranks in ranking.tolist()]
    soft = ranking_loss(scores, ranking, preferences=stack_preferences(rows))
    torch.testing.assert_close(soft, ranking_loss(scores, ranking))


def certain(ranks: list[int]) -> list[float]:
    return [0.5 + 0.5 * ((one < other) - (one > other)) for one, other in itertools.combinations(ranks, 2)]


def test_soft_labels_stand_at_their_pairs_whatever_else_is_in_the_batch() -> None:
    rows = [{"ranking": [1, 2], "preferences": [0.9]}, {"ranking": [1, 2, 3], "preferences": [0.8, 0.7, 0.6]}]
    found = stack_preferences([*rows, {"ranking": [2, 1], "preferences": None}])
    assert found.shape == (3, 3, 3) and int(found.isnan().sum()) == 27 - 4
    assert found[0, 0, 1] == 0.9 and [found[1, i, j] for i, j in ((0, 1), (0, 2), (1, 2))] == [0.8, 0.7, 0.6]


def test_soft_labels_come_from_the_file_to_the_loss(tmp_path: Path, folder: Path) -> None:
    ranked = {"prompt": "w4 w5", "responses": ["w6", "w7 w8", "w9"], "ranking": [1, 2, 3]}
    rows = [ranked | {"preferences": [0.9, 0.8, 0.7]}, ranked, ranked | {"preferences": [0.9, 0.8]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = prepare("reward", Stage(str(tmp_path / "rows.jsonl"), heldout=0), make_tokenizer(), None)
    assert found.report["dropped"] == {"lengths differ": 1}
    assert found.train["preferences"][:] == [[0.9, 0.8, 0.7], None]
    rows = found.train.to_list()
    trainer = trainer_of(RewardTrainer, folder, rows)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["preferences"].shape == (2, 3, 3), "the Trainer keeps the column"
    (loss, _), (hard, _) = (
        loss_and_gradient(trainer, [{**row, "preferences": soft} for row in rows[:1]])
        for soft in ([0.9, 0.8, 0.7], None)
    )
    assert loss != pytest.approx(hard)


@pytest.mark.parametrize(
    ("preferences", "part"), [([0.5, 0.5, 1.5], "not a probability"), ([True, 0.1, 0.2], "not a probability")]
)
def test_soft_labels_that_are_none(tmp_path: Path, preferences: list[float], part: str) -> None:
    row = {"prompt": "w4", "responses": ["w6", "w7", "w9"], "ranking": [1, 2, 3], "preferences": preferences}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=f"row 1, field 'preferences': {part}"):
        prepare("reward", Stage(str(tmp_path / "rows.jsonl")), make_tokenizer(), None)


def test_rows_of_one_prompt_are_told_from_those_of_others() -> None:
    texts = [([1, 2], [3, 4, 5]), ([1, 3], [4, 5]), ([1, 2], [6, 7])]  # a prompt, and what follows it
    rows = [{"responses_ids": [[*p, end] for end in ends], "prompt_length": 2} for p, ends in texts]
    ranking = torch.tensor([[1, 2, 3], [1, 2, 0], [2, 1, 0]])
    pairs = comparisons(rows, ranking, torch.zeros(3, 3), torch.zeros(3, 3), [[0.0] * 3] * 3)
    assert [pair["prompt"] for pair in pairs] == [0, 0, 0, 1, 0]


def test_the_words_alone_are_weighed_as_they_decided(tmp_path: Path) -> None:
    """Token 9 wins its pairs, whatever stands beside it and wherever; token 8 loses them; 7 is in both or neither."""

    def row(*responses: list[int], ranking: list[int]) -> dict[str, Any]:
        return {"responses_ids": [[9, 8, *ids] for ids in responses], "prompt_length": 2, "ranking": ranking}

    train = [row([9, 7], [7, 8], ranking=[1, 2]), row([8], [9, 9, 9], [7], ranking=[3, 1, 2])]
    ((good, bad, neither, twice),) = token_scores(train, [row([7, 9], [8], [11], [9, 9], ranking=[1, 1, 1, 1])])
    assert good > neither == 0 > bad, "prompts, which hold both tokens here, say nothing, nor does an unseen token"
    assert twice == pytest.approx(good, abs=0.02), "a token counts once"
    # One pair that differs in token 9 alone: the loss softplus(-w) + 4 w^2 is least where sigma(-w) = 8 w.
    ((weight,),) = token_scores([row([9], [], ranking=[1, 2])], [row([9], ranking=[1])])
    assert 1 / (1 + exp(weight)) == pytest.approx(8 * weight)


def test_rows_of_like_length_are_trained_together_and_evaluated_in_their_order(folder: Path) -> None:
    rng = random.Random(0)
    rows = [ranked_pair([5] * rng.randrange(2, 9), [6]) for _ in range(64)]
    rows = [{**row, "length": max(map(len, row["responses_ids"]))} for row in rows]
    trainer = trainer_of(
        RewardTrainer,
        folder,
        rows,
        train_sampling_strategy="group_by_length",
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
    )
    batches = [batch["attention_mask"].sum(1) for batch in trainer.get_train_dataloader()]
    spread = sum(int(lengths[0::2].max() - lengths[0::2].min()) for lengths in batches)  # of the chosen ones
    assert spread <= 30, "of 16 batches in a random order it is about 70"
    evaluated = torch.cat(
        [batch["attention_mask"].sum(1)[0::2] for batch in trainer.get_eval_dataloader(trainer.train_dataset)]
    )
    assert evaluated.tolist() == [len(row["responses_ids"][0]) for row in rows]


def test_comparisons_and_rankings_are_merged(tmp_path: Path) -> None:
    pairs = [{"prompt": f"w{i}", "chosen": "w6", "rejected": "w7 w8", "source": "old"} for i in range(4, 14)]
    ranked = [
        {"prompt": f"w{i}", "responses": ["w6", "w7", "w8"], "ranking": [2, 1, 2], "preferences": [0.1, 0.5, 0.9]}
        for i in range(10, 20)
    ]
    parts = []
    for name, rows in (("pairs", pairs), ("ranked", ranked)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        parts.append(prepare("reward", Stage(str(tmp_path / f"{name}.jsonl"), heldout=0.3), make_tokenizer(), None))
    whole = merge_comparisons(parts)
    assert len(whole.train) == sum(len(part.train) for part in parts) == whole.report["train"]
    assert len(whole.heldout) == sum(len(part.heldout) for part in parts) == whole.report["heldout"]
    assert whole.report["rows"] == 20 and whole.report["dropped"] == {}
    rows: Any = whole.train.to_list()
    old: Any = parts[0].train.to_list()
    for row, pair in zip(rows, old, strict=False):
        assert row == {**pair, "preferences": None} and row["ranking"] == [1, 2] and row["source"] == "old"
    assert rows[-1]["preferences"] == [0.1, 0.5, 0.9] and rows[-1]["source"] is None
    assert not set(starts(rows)) & set(starts(whole.heldout)), "no prompt is on both sides"


def test_merged_rows_without_margin_or_weight_get_none_of_them(tmp_path: Path) -> None:
    plain = {"prompt": "w4", "chosen": "w6", "rejected": "w7"}
    rows = [{**plain, "weight": 2, "margin": 0.5, "source": "web"}, {**plain, "weight": 4, "margin": 1}]
    paths = [write(tmp_path / "weighted.jsonl", rows), write(tmp_path / "plain.jsonl", [plain])]
    whole = merge_comparisons([read(path) for path in paths])
    columns = ("weight", "margin", "source", "ranking")
    found = [tuple(row[column] for column in columns) for row in whole.train.to_list()]
    assert found == [(2 / 3, 0.5, "web", [1, 2]), (4 / 3, 1.0, None, [1, 2]), (1.0, 0.0, None, [1, 2])]
    assert len(whole.heldout) == 0 and whole.heldout.column_names == whole.train.column_names


def test_the_order_of_the_responses_does_not_matter() -> None:
    scores, ranking, margin = torch.tensor([0.3, -1.2, 0.9, 2.0]), torch.tensor([2, 4, 2, 1]), torch.tensor([0.1])
    orders = [list(order) for order in itertools.permutations(range(4))]
    losses = [ranking_loss(scores[None, o], ranking[None, o], margin, 0.1, 0.01).item() for o in orders]
    assert losses == pytest.approx([losses[0]] * 24)


def test_a_row_costs_the_same_beside_a_longer_one() -> None:
    ranking = torch.tensor([[2, 1, 0, 0], [1, 2, 3, 3]])
    scores = fold(torch.tensor([0.1, 0.7, 1.0, 2.0, 3.0, 4.0]), ranking)
    assert scores.tolist() == [pytest.approx([0.1, 0.7, 0, 0]), [1, 2, 3, 4]]
    together = ranking_loss(scores, ranking, center_coefficient=0.1)
    assert together[0].item() == pytest.approx(softplus(-0.6) + 0.1 * 0.8**2)
    assert together[1] == ranking_loss(scores[1:], ranking[1:], center_coefficient=0.1)


def test_untied_pairs_are_named_better_first() -> None:
    row, better, worse = untied(torch.tensor([[2, 1, 0], [1, 1, 2]]))
    assert [*zip(row.tolist(), better.tolist(), worse.tolist(), strict=True)] == [(0, 1, 0), (1, 0, 2), (1, 1, 2)]


# --- The trainer ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def trainer_of(kind: Any, folder: Path, rows: list[dict[str, Any]], **args: Any) -> Any:
    """A trainer on a fresh copy of the model, and the batch of all rows."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    args = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, **args}
    config = (RewardConfig if kind is RewardTrainer else trl.RewardConfig)(str(folder / "out"), **args)
    return kind(model, config, train_dataset=Dataset.from_list(rows), processing_class=make_tokenizer())


def loss_and_gradient(trainer: Any, rows: list[dict[str, Any]]) -> tuple[float, list[torch.Tensor]]:
    loss = trainer.compute_loss(trainer.model.train(), trainer.data_collator(rows))
    loss.backward()
    return loss.item(), [p.grad for p in trainer.model.parameters()]


def ranked_pair(chosen_ids: list[int], rejected_ids: list[int], **others: Any) -> dict[str, Any]:
    """A row of TRL's columns in ours."""
    return {"responses_ids": [chosen_ids, rejected_ids], "ranking": [1, 2], **others}


def sequence(rng: random.Random) -> list[int]:
    return [rng.randrange(4, 64) for _ in range(rng.randint(3, 12))]


@pytest.mark.parametrize("center", [None, 0.05])
@pytest.mark.parametrize("margin", [False, True])
def test_two_responses_are_trls_loss_and_metrics(folder: Path, margin: bool, center: float | None) -> None:
    rng = random.Random(0)
    pairs: list[dict[str, Any]] = [{"chosen_ids": sequence(rng), "rejected_ids": sequence(rng)} for _ in range(6)]
    pairs = [{**pair, "margin": rng.random()} for pair in pairs] if margin else pairs
    rows = [ranked_pair(**pair) for pair in pairs]
    trainers = [
        trainer_of(kind, folder, given, center_rewards_coefficient=center)
        for kind, given in ((RewardTrainer, rows), (trl.RewardTrainer, pairs))
    ]
    (ours, gradient), (theirs, wanted) = map(loss_and_gradient, trainers, (rows, pairs))
    assert ours == pytest.approx(theirs, rel=1e-6)
    for one, other in zip(gradient, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    found, expected = ({name: values[-1] for name, values in t._metrics["train"].items()} for t in trainers)
    assert found.keys() == expected.keys() and found == pytest.approx(expected, rel=1e-5)


def test_a_ranking_is_its_six_pairs_at_a_sixth_each_and_each_response_is_run_once(folder: Path) -> None:
    rng = random.Random(1)
    best_first = [sequence(rng) for _ in range(4)]
    pairs = [{"chosen_ids": a, "rejected_ids": b} for a, b in itertools.combinations(best_first, 2)]
    shuffled = [{"responses_ids": [best_first[i] for i in (2, 0, 3, 1)], "ranking": [3, 1, 4, 2]}]
    ours = trainer_of(RewardTrainer, folder, shuffled, center_rewards_coefficient=0.05)
    theirs = trainer_of(trl.RewardTrainer, folder, pairs, center_rewards_coefficient=0.05)
    seen: list[int] = []
    ours.model.register_forward_pre_hook(lambda _, __, given: seen.append(len(given["input_ids"])), with_kwargs=True)
    (loss, gradient), (wanted_loss, wanted) = loss_and_gradient(ours, shuffled), loss_and_gradient(theirs, pairs)
    assert seen == [4]
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    for one, other in zip(gradient, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    names = ("accuracy", "margin", "min_reward", "max_reward")
    found, expected = ([t._metrics["train"][name][0] for name in names] for t in (ours, theirs))
    assert found == pytest.approx(expected, rel=1e-5)


def test_weights_multiply_rows_and_equal_micro_batches_change_nothing(folder: Path) -> None:
    rng = random.Random(2)
    rows = [
        {"responses_ids": [sequence(rng) for _ in ranks], "ranking": ranks, "weight": weight}
        for ranks, weight in (([1, 2], 0.5), ([2, 1, 2], 1.0), ([1, 2, 3, 4], 2.0), ([2, 2, 1], 0.5))
    ]
    trainer = trainer_of(RewardTrainer, folder, rows)

    def loss(rows: list[dict[str, Any]]) -> float:
        return trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item()

    plain = [loss([{**row, "weight": 1.0}]) for row in rows]
    assert loss(rows) == pytest.approx((0.5 * plain[0] + plain[1] + 2 * plain[2] + 0.5 * plain[3]) / 4, rel=1e-5)
    assert loss(rows) == pytest.approx((loss(rows[:2]) + loss(rows[2:])) / 2, rel=1e-5)


def test_smoothing_takes_a_share_of_the_labels_for_wrong(folder: Path) -> None:
    rng = random.Random(4)
    right = ranked_pair(sequence(rng), sequence(rng))
    wrong = ranked_pair(*reversed(right["responses_ids"]))
    smooth, plain = (trainer_of(RewardTrainer, folder, [right], label_smoothing=share) for share in (0.2, 0.0))
    (found, _), (one, _), (other, _) = (
        loss_and_gradient(*each) for each in ((smooth, [right]), (plain, [right]), (plain, [wrong]))
    )
    assert found == pytest.approx(0.8 * one + 0.2 * other) and found != pytest.approx(one)


def test_eval_loss_is_the_mean_over_rows(folder: Path) -> None:
    rng = random.Random(3)
    rows = [
        {"responses_ids": [sequence(rng) for _ in range(k)], "ranking": [*range(1, k + 1)]} for k in (2, 9, 3, 2, 5)
    ]
    trainer = trainer_of(RewardTrainer, folder, rows, per_device_eval_batch_size=2)
    found = trainer.evaluate(Dataset.from_list(rows))["eval_loss"]
    with torch.no_grad():
        each = [trainer.compute_loss(trainer.model, trainer.data_collator([row])).item() for row in rows]
    assert found == pytest.approx(sum(each) / 5, rel=1e-5)


# --- The rows ---------------------------------------------------------------------------------------------------------


def ranked(**changes: Any) -> dict[str, Any]:
    return {"prompt": "w4 w5", "responses": [" w6", " w7 w8", " w9"], "ranking": [2, 1, 2], **changes}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: str, **changes: Any) -> Any:
    return prepare("reward", Stage(path, **{"heldout": 0.0, **changes}), make_tokenizer(), 32)


def test_rankings_become_lists_of_ids(tmp_path: Path) -> None:
    four = ranked(responses=["w6", "w7", "w8", "w9"], ranking=[1, 2, 3, 4], source="web")
    result = read(write(tmp_path / "rows.jsonl", [ranked(), four]))
    first, second = result.train.to_list()
    assert first["responses_ids"] == [[4, 5, 6, 2], [4, 5, 7, 8, 2], [4, 5, 9, 2]] and first["ranking"] == [2, 1, 2]
    assert [len(row["responses_ids"]) for row in (first, second)] == [3, 4]
    assert first["prompt_length"] == 2 and [first["source"], second["source"]] == [None, "web"]
    assert result.report["used"] == 2 and not result.report["dropped"]


@pytest.mark.parametrize("wrap", [lambda message: message, lambda message: [message]], ids=["message", "list"])
def test_responses_may_be_messages(tmp_path: Path, wrap: Any) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content + ' ' + (eos_token if m.role == 'assistant' else '') }}{% endfor %}"
    )
    responses = [wrap({"role": "assistant", "content": text}) for text in ("w6", "w7")]
    row = ranked(prompt=[{"role": "user", "content": "w4"}], responses=responses, ranking=[2, 1])
    result = prepare("reward", Stage(write(tmp_path / "rows.jsonl", [row]), heldout=0.0), tokenizer, None)
    assert result.conversational and result.train[0]["responses_ids"] == [[4, 6, 2], [4, 7, 2]]


def test_rankings_in_csv_and_renamed(tmp_path: Path) -> None:
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerows([("prompt", "responses", "order"), ("w4 w5", '["w6", "w7"]', "[2, 1]"), ("w4", "w5", "[1, 2]")])
    result = read(str(tmp_path / "rows.csv"), columns={"ranking": "order"})
    assert result.train[0]["responses_ids"] == [[4, 5, 6, 2], [4, 5, 7, 2]] and result.train[0]["ranking"] == [2, 1]
    assert "data row 2, field 'responses': wrong type: 'w5' is no JSON list" in result.report["examples"][0]


BAD = {
    "one response": ({"responses": ["w6"], "ranking": [1]}, "field 'responses': number of responses: 1, not 2 to 9"),
    "ten": ({"responses": [f"w{i}" for i in range(4, 14)], "ranking": [*range(1, 11)]}, "number of responses: 10"),
    "lengths": ({"ranking": [1, 2]}, "lengths differ: 2 ranks for 3 responses"),
    "tied": ({"ranking": [2, 2, 2]}, "all tied"),
    "empty": ({"responses": ["w6", " ", "w7"]}, r"field 'responses\[1\]': empty"),
    "scores": ({"ranking": [0.2, 0.9, 0.1]}, "wrong ranks: .* whole numbers from 1, the best, to 3"),
    "from 0": ({"ranking": [0, 1, 2]}, "wrong ranks"),
    "truth": ({"ranking": [True, 2, 3]}, "wrong ranks"),
    "equal texts": ({"responses": ["w6", "w6", "w7"], "ranking": [1, 2, 3]}, "equal texts ranked differently"),
    "text": ({"ranking": {"a": 1}}, "field 'ranking': wrong type: dict, not a list"),
    "missing": ({"responses": None}, "field 'responses': missing field"),
    "too long": ({"responses": ["w6", "w7 " * 40, "w8"]}, r"field 'responses\[1\]': too long: 43 tokens, limit 32"),
    "weight": ({"weight": 0}, "field 'weight': not above 0: 0"),
    "infinite": ({"weight": 1e999}, "field 'weight': wrong type: inf is no finite number"),
    "no weight": ({"weight": None}, "field 'weight': missing field"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
def test_bad_rankings_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "rows.jsonl", [ranked(weight=1), ranked(weight=1), ranked(**{"weight": 1, **changes})])
    assert read(path).report["used"] == 2
    with pytest.raises(ValueError, match=rf"reward\.data: 1 of 3 rows.*\n.*row 3, .*{message}"):
        read(path, bad_rows="refuse")


def test_weights_have_mean_1_over_the_training_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"w{i}", "chosen": "w4", "rejected": "w5", "weight": str(i)} for i in range(4, 24)]
    result = read(write(tmp_path / "rows.jsonl", rows), heldout=0.3)
    assert len(result.heldout) > 0
    assert sum(result.train["weight"]) / len(result.train) == pytest.approx(1)
    scale = result.train[0]["weight"] / result.train[0]["responses_ids"][0][0]
    for row in [*result.train, *result.heldout]:
        assert row["weight"] == pytest.approx(scale * row["responses_ids"][0][0])


# --- The whole stage --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """SFT and an ensemble of two reward models on rankings: the more of a response is the word w4, the better it is."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = random.Random(0)
    save_model(folder / "model")
    prompts = [f"w{i} w{j}" for i in range(10, 20) for j in range(20, 30)]
    write(folder / "sft.jsonl", [{"prompt": prompt, "completion": f"w4 w{rng.randrange(5, 9)}"} for prompt in prompts])
    rows = []
    for prompt in prompts:
        good = [rng.randrange(5) for _ in range(rng.randint(2, 5))]
        good[:2] = rng.sample(range(5), 2)  # not all tied
        texts = [" ".join(["w4"] * n + [f"w{rng.randrange(5, 64)}" for _ in range(4 - n)]) for n in good]
        rows.append({"prompt": prompt, "responses": texts, "ranking": [1 + sum(m > n for m in good) for n in good]})
    write(folder / "reward.jsonl", [{**row, "source": prompt[:2]} for row, prompt in zip(rows, prompts, strict=True)])
    args = {"per_device_train_batch_size": 8, "gradient_checkpointing": False, "learning_rate": 1e-2}
    return Recipe(
        name="ranked",
        base=Base(str(folder / "model")),
        lora=Lora(r=4, alpha=8),
        sft=Stage(str(folder / "sft.jsonl"), heldout=0.1, args={**args, "max_steps": 2}),
        reward=Stage(
            str(folder / "reward.jsonl"),
            heldout=0.2,
            args={**args, "max_steps": 40, "save_steps": 20, "logging_steps": 20, "ensemble_size": 2},
        ),
        tracker="none",
    )


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(recipe, folder)
    return folder


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())["stages"]["reward"]["results"]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The logged rows without clocks and counts since the start of the process."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    left_out = ("train_", "eval_runtime", "eval_samples", "eval_steps", "num_tokens", "eval_num_tokens", "eval_model")
    return [{key: value for key, value in row.items() if not key.startswith(left_out)} for row in rows]


def test_a_stage_on_rankings_learns_them(recipe: Recipe, finished: Path) -> None:
    results = results_of(finished)
    assert results["heldout_accuracy"] == results["members_accuracy"][0] > 0.8 and results["members_accuracy"][1] > 0.8
    evaluated = [row for row in rows_of(finished) if "eval_loss" in row]
    assert [(row["stage"], row["step"]) for row in evaluated] == [("sft", 2), ("reward", 40), ("reward-1", 40)]
    assert results["heldout_loss"] == pytest.approx(evaluated[1]["eval_loss"], rel=1e-4)
    card = results["card"]
    tokenizer = load_tokenizer(recipe.base)
    assert recipe.reward is not None
    rankings = prepare("reward", recipe.reward, tokenizer, 1024).train["ranking"]
    assert card["train_pairs"] == sum(a != b for ranks in rankings for a, b in itertools.combinations(ranks, 2))
    assert card["accuracy"]["rate"] == pytest.approx(results["heldout_accuracy"])
    assert card["by_source"].keys() == {"w1"} and card["swap_error"] < 1e-4
    assert (finished / "reward" / "card.md").is_file()


def test_heldout_rows_are_scored_once(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, scored, scores = random.Random(0), [], SharedBase.scores

    def counted(shared: SharedBase, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scored.append(len(ids))
        return scores(shared, ids, mask)

    monkeypatch.setattr(SharedBase, "scores", counted)
    rows = [
        {"prompt": f"w{i} w{j}", "chosen": f"w{rng.randrange(4, 64)} w5", "rejected": f"w{rng.randrange(4, 64)}"}
        for i in range(4, 14)
        for j in range(20, 40)
    ]
    pairs = {"data": write(tmp_path / "pairs.jsonl", rows), "heldout": 0.5, "max_steps": 2, "ensemble_size": 1}
    run(replace(recipe, sft=None, reward=pairs), tmp_path / "run")
    results = results_of(tmp_path / "run")
    heldout = results["card"]["accuracy"]["pairs"]
    assert heldout > 80 and sum(scored) <= 8 + 2 * 16, "the probes, and a sample in another order"
    assert results["card"]["swap_error"] < 1e-4
    assert results["card"]["accuracy"]["rate"] == pytest.approx(results["heldout_accuracy"])
    assert "reward, evaluation" in capsys.readouterr().err


def test_members_are_whole_adapters_of_their_own(recipe: Recipe, finished: Path) -> None:
    folders = member_folders(finished)
    assert folders == {"reward": finished / "reward", "reward_1": finished / "reward" / "member-1"}
    assert judge_folder(finished) == {}, "there is none unless it is asked for"
    assert recipe.sft is not None
    demonstrations = prepare("sft", recipe.sft, load_tokenizer(recipe.base), None).heldout["input_ids"]
    shared = SharedBase(load_base(recipe.base), recipe.lora)
    scores = []
    add_reward_roles(shared, folders)
    for role, folder in folders.items():
        written = json.loads((folder / BIAS).read_text())
        assert written == {"bias": shared.biases[role], "demonstrations": len(demonstrations)} and written["bias"] != 0
        scores.append(score_rows(shared, demonstrations, role))
        assert scores[-1].mean().item() == pytest.approx(0, abs=1e-5), "demonstrations score 0 on average"
        assert (folder / "base.json").read_bytes() == (finished / "sft" / "base.json").read_bytes()
    assert not torch.allclose(*scores, atol=1e-2), "the members have different seeds"
    with pytest.raises(ValueError, match="scores its probe rows differently"):
        check_probes(shared, folders["reward_1"], "reward")


def test_a_demonstration_that_was_cut_counts_for_no_bias(recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    assert recipe.sft is not None
    tokenizer = load_tokenizer(recipe.base)
    data = prepare("sft", recipe.sft, tokenizer, None)
    whole, short = data.heldout["input_ids"][:], data.heldout["input_ids"][0][:-1]
    data = dataclasses.replace(data, heldout=Dataset.from_dict({"input_ids": [*whole, short]}))
    shared = SharedBase(load_base(recipe.base), recipe.lora)
    add_reward_roles(shared, {"reward": finished / "reward"})
    written = json.loads((finished / "reward" / BIAS).read_text())
    assert len(set_bias(shared, tmp_path, "reward", data)) == len(whole)
    assert json.loads((tmp_path / BIAS).read_text())["bias"] == pytest.approx(written["bias"], abs=1e-5)
    nothing = dataclasses.replace(data, heldout=Dataset.from_dict({"input_ids": [short]}))
    assert set_bias(shared, tmp_path, "reward", nothing) == []


def killed(whole: Path, adapter: str, copy: Path) -> Path:
    """A copy of a finished run as it is where it was killed after step 20 of one of its reward adapters."""
    shutil.copytree(whole, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["stages"]["reward"]["state"] = "running"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    folder = copy / "reward" / adapter
    for path in (*folder.glob("*.json"), *folder.glob("*.safetensors")):
        path.unlink()
    shutil.rmtree(folder / "checkpoint-40")
    return copy


def assert_goes_on(recipe: Recipe, whole: Path, adapter: str, folder: Path) -> None:
    """Run again, a killed run trains only the rest, and ends as the whole one did."""
    still = (Path("reward") / WEIGHTS, Path("reward") / adapter / "checkpoint-20")
    before = {path: (folder / path).stat().st_mtime_ns for path in still}
    run(recipe, folder)
    assert all((folder / path).stat().st_mtime_ns == written for path, written in before.items())
    assert (folder / "reward" / adapter / WEIGHTS).read_bytes() == (whole / "reward" / adapter / WEIGHTS).read_bytes()
    assert rows_of(folder) == rows_of(whole)
    assert results_of(folder) == results_of(whole)


def test_an_ensemble_goes_on_where_it_was_killed(recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    assert_goes_on(recipe, finished, "member-1", killed(finished, "member-1", tmp_path / "run"))


def test_members_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        (tmp_path / "reward" / f"member-{number}").mkdir(parents=True)
    found = {role: folder.name for role, folder in member_folders(tmp_path).items()}
    assert [*found.items()] == [
        ("reward", "reward"),
        ("reward_1", "member-1"),
        ("reward_2", "member-2"),
        ("reward_3", "member-10"),
    ]


# --- The judge --------------------------------------------------------------------------------------------------------


def starts(rows: Any) -> list[tuple[int, ...]]:
    return [tuple(row["responses_ids"][0][: row["prompt_length"]]) for row in rows]


@pytest.mark.parametrize("ranked_rows", [False, True])
def test_the_judge_has_prompts_of_its_own(tmp_path: Path, ranked_rows: bool) -> None:
    pair, ranks = {"chosen": "w4", "rejected": "w5"}, {"responses": ["w6", "w7", "w8"], "ranking": [1, 2, 3]}
    rows = [{"prompt": f"w{i} w{j}", **(ranks if ranked_rows else pair)} for i in range(4, 24) for j in range(4, 14)]
    prepared = read(write(tmp_path / "rows.jsonl", rows + rows[::3]), heldout=0.2)
    rest, aside = set_aside(prepared.train, 0.3, seed=0)
    sides = [set(starts(side)) for side in (rest, aside, prepared.heldout)]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 200, "no prompt is on two sides"
    assert len(rest) + len(aside) == len(prepared.train)
    assert 0.2 < len(sides[1]) / (len(sides[0]) + len(sides[1])) < 0.4
    assert starts(rest) == [start for start in starts(prepared.train) if start in sides[0]], "in their order"
    again, shuffled = (set_aside(prepared.train.shuffle(seed=seed), 0.3, seed=0)[1] for seed in (1, 2))
    assert set(starts(again)) == set(starts(shuffled)) == sides[1]
    assert set(starts(set_aside(prepared.train, 0.3, seed=1)[1])) != sides[1]
    whole, none = set_aside(prepared.train, 0.0, seed=0)
    assert whole.to_list() == prepared.train.to_list() and len(none) == 0


def test_one_prompt_cannot_be_shared_out(recipe: Recipe, tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "chosen": "w4", "rejected": "w5"} for prompt in ("w6", "w7")]
    data = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        ValueError, match=r"reward\.judge_share shares out the training prompts by what the user says first"
    ):
        run(replace(recipe, reward={"data": data, "judge_share": 0.5}), tmp_path / "run")
    assert not (tmp_path / "run" / "sft").exists(), "that is said before anything is trained"


@pytest.fixture(scope="module")
def judged(recipe: Recipe, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A run of the reward stage with a judge, on the same SFT adapter, and its recipe."""
    folder = shutil.copytree(
        finished, tmp_path_factory.mktemp("judged") / "run", ignore=shutil.ignore_patterns("reward")
    )
    (folder / "recipe.json").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["stages"]["reward"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "metrics.jsonl").unlink()
    with_judge = replace(recipe, reward={"judge_share": 0.4, "ensemble_size": 1})
    run(with_judge, folder)
    return with_judge, folder


def test_the_judge_is_an_adapter_like_the_others_and_no_member(
    judged: tuple[Recipe, Path], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, folder = judged
    assert member_folders(folder) == {"reward": folder / "reward"}
    assert judge_folder(folder) == {"judge": folder / "reward" / "judge"}
    results = results_of(folder)
    assert results["members_accuracy"] == [results["heldout_accuracy"]] and results["judge_accuracy"] > 0.6
    evaluated = [row for row in rows_of(folder) if "eval_loss" in row]
    assert [row["stage"] for row in evaluated] == ["reward", "reward-judge"]
    shared = SharedBase(load_base(recipe.base), recipe.lora)
    add_reward_roles(shared, member_folders(folder) | judge_folder(folder))  # which checks the probes
    assert (folder / "reward" / "judge" / "base.json").read_bytes() == (finished / "sft" / "base.json").read_bytes()
    assert shared.biases["judge"] != 0
    rows = [[10, 20, 4, 4, 4, 2], [10, 20, 30, 40, 50, 2]]
    assert not torch.allclose(score_rows(shared, rows, "reward"), score_rows(shared, rows, "judge"), atol=1e-2)
    assert recipe.reward is not None
    train = prepare("reward", recipe.reward, load_tokenizer(recipe.base), 1024).train
    sides = dict(zip(("reward", "reward-judge"), set_aside(train, 0.4, 0), strict=True))
    assert results["card"]["train_pairs"] == count_pairs(sides["reward"]), "less what the judge has"
    args = recipe.reward.args
    batch = args["per_device_train_batch_size"] * args.get("gradient_accumulation_steps", 1)
    for stage, side in sides.items():
        last = [row for row in rows_of(folder) if row["stage"] == stage and "loss" in row][-1]
        assert last["step"] / last["epoch"] == pytest.approx(math.ceil(len(side) / batch)), "of its own rows alone"
    summary = run(recipe, folder)
    assert summary["judge_accuracy"] == results["judge_accuracy"]
    assert f"(judge {results['judge_accuracy']:.1%})" in " ".join(capsys.readouterr().out.split())


def test_a_judge_goes_on_where_it_was_killed(judged: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, whole = judged
    folder = killed(whole, "judge", tmp_path / "run")
    assert judge_folder(folder) == {}, "it is not finished"
    assert_goes_on(recipe, whole, "judge", folder)


# --- Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("label_smoothing", 0.5, "below 0.5"),
        ("label_smoothing", -0.1, "at least 0"),
        ("ensemble_size", 0, "above 0"),
        ("judge_share", 1.0, "at least 0 and below 1"),
        ("judge_share", -0.1, "at least 0 and below 1"),
    ],
)
def test_options_out_of_range_are_refused(recipe: Recipe, tmp_path: Path, key: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=rf"reward\.{key} must be .*{message}"):
        run(replace(recipe, reward={key: value}), tmp_path / "run")


def test_ties_with_soft_labels_are_ranked_by_them(tmp_path: Path) -> None:
    tied = {"prompt": "w4", "responses": ["w6", "w7", "w9"], "ranking": [1, 1, 1]}
    rows = [{**tied, "preferences": soft} for soft in ([0.4, 0.5, 0.7], [0.5, 0.5, 0.5], [0.6, 0.4, 0.6], None)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = prepare("reward", Stage(str(tmp_path / "rows.jsonl"), heldout=0), make_tokenizer(), None)
    # Wins expected of the first: 0.9, 1.3, 0.8. The third is a ring, and as tied as the second and the fourth.
    assert found.train["ranking"][:] == [[2, 1, 3]] and found.report["dropped"] == {"all tied": 3}
