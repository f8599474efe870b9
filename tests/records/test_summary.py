"""Win rates with their intervals, the summary of a run, and the table at its end."""

from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rlhf_recipes.records.manifest import Manifest
from rlhf_recipes.records.rates import effective_number, interval, win_rate
from rlhf_recipes.records.summary import footnote, summarize, table
from rlhf_recipes.stages.compare import means, quality


def test_an_interval_by_hand() -> None:
    # z^2 = 3.8415: the middle is (8 + 1.9207) / 13.8415 = 0.71673, half of it 1.96 sqrt(0.71673 * 0.28327 / 13.8415).
    assert interval(0.8, 10) == (pytest.approx(0.4794, abs=1e-4), pytest.approx(0.9541, abs=1e-4))
    assert interval(1.0, 10) == (pytest.approx(0.6791, abs=1e-4), 1.0), "all won: 11.9207 of 13.8415"
    assert interval(0.0, 10) == (0.0, pytest.approx(1 - 0.6791, abs=1e-4))


def test_how_many_independent_answers_a_rate_is_worth() -> None:
    def number(values: list[float], prompts: list[int]) -> float:
        errors = np.array(values) - np.mean(values)
        return effective_number(float(np.mean(values)), errors, np.array(prompts))

    # One answer to each of 10 prompts: a variance of 0.16 / 10 if answers are alike, and 10 / 9 of that as measured.
    # Z^2 = 3.8415 prompts are averaged in, and 3.8415 / 1.6 as many, because 10 * 0.16 = 1.6 is below Z^2.
    added = 3.8415 * 3.8415 / 1.6
    once = number([1.0] * 8 + [0.0] * 2, [*range(10)])
    assert once == pytest.approx(10 * (10 + added) / (10 * 10 / 9 + added), rel=1e-4)
    twice = number([1.0] * 16 + [0.0] * 4, [i // 2 for i in range(20)])
    assert twice == pytest.approx(once), "a copy of each answer adds nothing"
    # Answers that differ within a prompt and not between them: no variance is measured, and only what is added is left.
    added = 3.8415 * 3.8415 / 2.5
    assert number([1.0, 0.0] * 10, [i // 2 for i in range(20)]) == pytest.approx(10 * (10 + added) / added, rel=1e-4)
    ties = number([0.5] * 8 + [1.0, 0.0], [*range(10)])
    assert ties == pytest.approx(0.25 * (10 + added) / (10 * 0.5 / 100 * 10 / 9 + added * 0.25 / 10), rel=1e-4)
    assert number([1.0] * 40, [i // 4 for i in range(40)]) == 10
    assert number([1.0] * 12, [0] * 9 + [1, 2, 3]) == pytest.approx(144 / 84), "one prompt is nearly all there is"


def test_a_win_rate_counts_ties_half_and_prompts_once() -> None:
    found = win_rate([1.0, 1.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0], ["a", "a", "b", "c"])
    assert (found["rate"], found["prompts"]) == (0.5, 3)
    assert found["low"] == pytest.approx(1 - found["high"]) and 0 < found["low"] < 0.2


def test_means_are_over_the_rows() -> None:
    samples = [
        {"prompt": "a", "completion": "b", "response_length": n, "ended": n < 3, "kl": 0.5 * n, "score": -n}
        for n in (1, 2, 3, 4)
    ]
    wanted = {"response_length": 2.5, "kl": 1.25, "score": -2.5, "without_eos": 0.5}
    assert means(samples) == wanted
    assert means([{**sample, "gold": 2.0} for sample in samples]) == {**wanted, "gold": 2.0}


def manifest(gold: bool) -> Manifest:
    """What a finished run of three stages leaves, with and without a known quality."""
    models = {
        model: {"score": score, "kl": kl, "response_length": 20.25, "without_eos": 0.125}
        for model, score, kl in (("base", -1.5, 3.5), ("sft", 0.25, 0.0), ("ppo", 1.75, 4.5))
    }
    rate = {"rate": 0.8, "low": 0.49, "high": 0.943, "prompts": 10}
    ppo: dict[str, Any] = {"models": models, "reward_win_rate_vs_sft": rate}
    if gold:
        ppo["win_rate_vs_sft"] = {**rate, "rate": 0.75}
        for model, value in (("base", 0.125), ("sft", 0.5), ("ppo", 0.875)):
            models[model]["gold"] = value
    results = {
        "sft": {"heldout_loss": 1.2345},
        "reward": {"heldout_accuracy": 0.725, "heldout_loss": 0.5},
        "ppo": ppo,
    }
    records: Any = {
        stage: {"state": "done", "seconds": 30.0, "peak_memory_mib": 1000.0 + i, "results": found}
        for i, (stage, found) in enumerate(results.items())
    }
    return Manifest(records)


def test_a_summary_gathers_the_stages_results() -> None:
    summary = summarize(manifest(gold=True))
    assert summary["win_rate_vs_sft"]["rate"] == 0.75 and summary["reward_win_rate_vs_sft"]["rate"] == 0.8
    assert summary["sft_heldout_loss"] == 1.2345 and summary["reward_model_accuracy"] == 0.725
    assert summary["kl"] == 4.5
    assert summary["gold_score"] == {"base": 0.125, "sft": 0.5, "ppo": 0.875}
    assert summary["reward_score"] == {"base": -1.5, "sft": 0.25, "ppo": 1.75}
    assert summary["seconds"] == {"sft": 30.0, "reward": 30.0, "ppo": 30.0}
    assert summary["peak_memory_mib"]["ppo"] == 1002.0
    line = footnote(summary)
    assert line == (
        "SFT held-out loss 1.234 nats per token; reward model held-out accuracy 72.5%; "
        "1.5 minutes, peak memory 1,002 MiB"
    )


def test_a_summary_of_a_run_whose_ppo_is_not_finished_has_no_models() -> None:
    unfinished = manifest(gold=True)
    del unfinished.stages["ppo"]
    summary = summarize(unfinished)
    assert summary["reward_score"] == {} and summary["kl"] is None and summary["win_rate_vs_sft"] is None
    assert footnote(summary).endswith("1.0 minutes, peak memory 1,001 MiB")


@pytest.mark.parametrize("gold", [False, True])
def test_the_table_has_a_row_for_each_model(gold: bool) -> None:
    console = Console(record=True, width=120)
    console.print(table(summarize(manifest(gold))))
    lines = [
        [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")]
        for line in console.export_text().splitlines()
    ]
    known = {"base": ["0.12", ""], "SFT": ["0.50", ""], "PPO": ["0.88", "75.0% (49.0% to 94.3%)"]}
    rows = {line[0]: line[1:] for line in lines if len(line) > 1}
    assert rows["model"] == [*(["gold", "wins vs SFT (95 %)"] if gold else []), "reward", "KL", "tokens", "no EOS"]
    rest = {"base": ["-1.50", ""], "SFT": ["0.25", ""], "PPO": ["1.75", "4.50"]}
    for model, numbers in rest.items():
        assert rows[model] == [*(known[model] if gold else []), *numbers, "20.2", "12.5%"]


@pytest.mark.parametrize("gold", [False, True])
def test_a_judge_says_who_wins_where_gold_does_not(gold: bool) -> None:
    judged = manifest(gold)
    results = {stage: judged.results(stage) for stage in judged.stages}
    results["reward"]["judge_accuracy"] = 0.7
    results["ppo"]["judge_win_rate_vs_sft"] = {"rate": 0.6, "low": 0.31, "high": 0.83, "prompts": 10}
    for model, value in (("base", -0.5), ("sft", 0.0), ("ppo", 0.625)):
        results["ppo"]["models"][model]["judge"] = value
    summary = summarize(judged)
    assert summary["judge_score"] == {"base": -0.5, "sft": 0.0, "ppo": 0.625} and summary["judge_accuracy"] == 0.7
    assert summary["judge_win_rate_vs_sft"]["rate"] == 0.6
    assert "reward model held-out accuracy 72.5% (judge 70.0%); " in footnote(summary)
    labels = [str(column.header) for column in table(summary).columns]
    assert labels[1:5] == (
        ["gold", "wins vs SFT (95 %)", "judge", "reward"] if gold else ["judge", "wins by judge (95 %)", "reward", "KL"]
    )


def test_quality_is_gold_where_it_is_known_and_else_what_the_judge_says() -> None:
    assert quality({"gold": 0.5, "judge": 2.0, "score": 3.0}) == {"quality": 0.5}
    assert quality({"judge": 2.0, "score": 3.0}) == {"quality": 2.0}
    assert quality({"score": 3.0}) == {}, "the reward that is trained on is no quality"
