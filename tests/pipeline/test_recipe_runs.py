"""Every shipped recipe is run, in a small setting: on the tiny world, and on a real pretrained story model."""

import json
import math
from pathlib import Path

import pytest
from support.architectures import save_architecture, save_vision_model
from support.paths import SHARED
from support.small import small
from support.worded import WORDS, write

from rlhf_recipes import load, replace
from rlhf_recipes.pipeline.run import run

STORIES = SHARED / "models" / "stories260K"
HH = SHARED / "data" / "hh_base_eval10.jsonl.gz"
on_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="the story model is not beside the repository")
on_hh = pytest.mark.skipif(not HH.is_file(), reason="the HH comparisons are not beside the repository")


def rows(run_dir: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def test_the_tiny_recipe_goes_from_base_to_ppo_and_measures_gold(tmp_path: Path) -> None:
    recipe = small("tiny", reward=160, episodes=128)
    summary = run(recipe, tmp_path / "run")
    assert set(summary["gold_score"]) == set(summary["reward_score"]) == {"base", "sft", "ppo"}
    assert 0 <= summary["win_rate_vs_sft"]["low"] <= summary["win_rate_vs_sft"]["rate"] <= 1
    assert summary["win_rate_vs_sft"]["prompts"] == 32
    assert 0 < summary["reward_model_accuracy"] < 1


@pytest.mark.long
def test_the_tiny_recipe_at_its_own_size_gets_better_by_gold(tmp_path: Path) -> None:
    summary = run(replace(load("tiny"), tracker="none"), tmp_path / "run")
    gold, wins = summary["gold_score"], summary["win_rate_vs_sft"]
    assert gold["base"] < gold["sft"] < gold["ppo"] - 0.2
    assert wins["low"] > 0.55 and wins["prompts"] == 256
    assert 0.6 < summary["reward_model_accuracy"] < 0.8, "no more than the labelers agree with gold"
    assert 0.5 < summary["kl"] < 4


@pytest.mark.long
def test_dpo_at_its_own_size_gets_better_by_gold(tmp_path: Path) -> None:
    summary = run(replace(load("tiny-dpo"), tracker="none"), tmp_path / "run")
    assert summary["gold_score"]["dpo"] > summary["gold_score"]["sft"] + 0.1
    assert summary["win_rate_vs_sft"]["low"] > 0.5


def test_the_recipe_of_rounds_labels_its_own_answers(tmp_path: Path) -> None:
    recipe = replace(small("tiny-rounds", reward=160, episodes=128), rounds={"size": 32, "count": 2})
    summary = run(recipe, tmp_path / "run")
    assert set(summary["gold_score"]) == {"base", "sft", "ppo", "ppo_2"}
    labels = rows(tmp_path / "run" / "round-2" / "feedback", "labels.jsonl")
    assert len(labels) > 24 and {tuple(row["ranking"]) for row in labels} == {(1, 2), (2, 1)}
    assert all(origin["model"] == "ppo" for row in labels for origin in row["origins"])


def test_the_recipe_of_own_data_runs_whole_on_the_files_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the recipe names its files by its own place
    recipe = replace(
        small("my-data", reward=30, episodes=32),
        base={"chat_template": None},
        sft={"max_steps": 2},
        reward={"max_steps": 2},
        ppo={"heldout_limit": 4},
    )
    summary = run(recipe, tmp_path / "run")
    assert set(summary["reward_score"]) == {"base", "sft", "ppo"} and summary["win_rate_vs_sft"] is None
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    data = {stage: manifest["stages"][stage]["data"] for stage in ("sft", "reward", "ppo")}
    assert {stage: (said["rows"], said["used"]) for stage, said in data.items()} == {
        "sft": (30, 30),
        "reward": (30, 30),
        "ppo": (40, 40),
    }
    logged = {name for row in rows(tmp_path / "run", "metrics.jsonl") for name in row}
    assert {"rewards/is_short/mean", "rewards/reward_model/mean"} <= logged


def run_stories(run_dir: Path, episodes: int) -> list[float]:
    """Run the stories recipe on the real model for so many episodes, and return the mean score of each rollout."""
    recipe = replace(
        load("stories"),
        tracker="none",
        base={"model": str(STORIES)},
        ppo={"total_episodes": episodes, "response_length": 24, "heldout_limit": 16, "per_device_train_batch_size": 32},
    )
    run(recipe, run_dir)
    logged = rows(run_dir, "metrics.jsonl")
    assert {"rewards/ends_well/mean", "rewards/is_short/mean"} <= {name for row in logged for name in row}
    assert all(isinstance(row["completion"], str) for row in rows(run_dir, "samples.jsonl"))
    return [row["objective/scores"] for row in logged if "objective/scores" in row]


@on_stories
def test_the_stories_recipe_runs_on_a_real_model(tmp_path: Path) -> None:
    assert len(run_stories(tmp_path, 64)) == 2


@pytest.mark.long
@on_stories
def test_the_stories_recipe_raises_its_python_reward_on_a_real_model(tmp_path: Path) -> None:
    scores = run_stories(tmp_path, 512)
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.3


@on_stories
@on_hh
@pytest.mark.long
@pytest.mark.parametrize("name", ["qwen3-0-6b-hh", "mistral-7b-hh"])
def test_the_hh_recipes_run_whole_on_real_comparisons(name: str, tmp_path: Path) -> None:
    small = {"data": str(HH), "limit": 24, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    ppo = {"mini_batch_size": 4, "num_mini_batches": 2, "response_length": 16, "max_steps": 1}
    ppo |= {"per_device_train_batch_size": 4, "rollout_micro_batch_size": 8}  # `auto` is the next test's
    recipe = replace(
        load(name),
        tracker="none",
        base={"model": str(STORIES)},
        sft=small,
        reward=small,
        ppo={"data": str(HH), "limit": 24, "heldout_limit": 4, **ppo},
    )
    summary = run(recipe, tmp_path)
    logged = [value for row in rows(tmp_path, "metrics.jsonl") for value in row.values() if isinstance(value, float)]
    assert all(math.isfinite(value) for value in logged)
    assert set(summary["reward_score"]) == {"base", "sft", "ppo"}
    assert summary["win_rate_vs_sft"] is None, "no gold is known here, and none is made up"


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("gemma-3-4b-hh", "gemma3"),
        *(
            pytest.param(name, architecture, marks=pytest.mark.long)
            for name, architecture in (
                ("smollm3-3b-hh", "smollm3"),
                ("gemma-3-12b-hh", "gemma3"),
                ("qwen3-4b-tldr", "qwen3"),
                ("qwen3-4b-ultrafeedback", "qwen3"),
                ("qwen3-8b-ultrafeedback", "qwen3"),
                ("llama-3-1-8b-helpsteer3", "llama"),
            )
        ),
    ],
)
def test_the_recipes_for_one_card_run_whole_on_their_architecture(name: str, architecture: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_vision_model(base) if architecture == "gemma3" else save_architecture(base, architecture)
    prompts = [f"{one} {WORDS[-1 - index]}" for index, one in enumerate(WORDS[:24])]
    pairs = [{"prompt": prompt, "chosen": " w5 w6", "rejected": " w7 w8 w9"} for prompt in prompts]
    stage = {"data": str(write(tmp_path / "pairs.jsonl", pairs)), "per_device_train_batch_size": 4, "limit": None}
    recipe = replace(
        load(name),
        tracker="none",
        # The words have no tokens of chatml's.
        base={"model": str(base), "chat_template": "transcript"},
        sft={**stage, "gradient_accumulation_steps": 1, "max_steps": 2},
        reward={**stage, "gradient_accumulation_steps": 1, "max_steps": 2},
        ppo={
            **{**stage, "heldout_limit": 4, "max_prompt_length": 16, "response_length": 8, "max_steps": 1},
            **{"mini_batch_size": 4, "num_mini_batches": 2},
        },
    )
    summary = run(recipe, tmp_path / "run")
    assert set(summary["reward_score"]) == {"base", "sft", "ppo"}
    logged = [value for row in rows(tmp_path / "run", "metrics.jsonl") for value in row.values()]
    assert all(math.isfinite(value) for value in logged if isinstance(value, float))
