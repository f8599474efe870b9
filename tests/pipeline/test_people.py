"""A person's path, end to end: sample, label by two people in Chromium, agreement, reward model, PPO."""

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import safetensors.torch
import torch
from playwright.sync_api import Page
from support.label_page import done, press, serving, shown
from support.worded import make_recipe, read

from rlhf_recipes import replace, run
from rlhf_recipes.cli.main import main_cli
from rlhf_recipes.feedback.rows import read_labels

pytestmark = pytest.mark.filterwarnings("ignore:.*keyword.*is deprecated")  # crowd-kit's use of pandas


def keys(lengths: list[int]) -> str:
    """What a labeler who likes the least presses: a choice between two, or a rank for each of more."""
    ranks = [1 + sorted(set(lengths)).index(length) for length in lengths]
    if len(ranks) == 2:
        return f"{'=' if ranks[0] == ranks[1] else 1 + ranks.index(1)} Enter"
    return " ".join(map(str, ranks)) + " Enter"


def test_from_a_policy_to_two_people_and_back(
    tmp_path: Path, opened: Callable[[str, str], Page], capsys: pytest.CaptureFixture[str]
) -> None:
    rounds = {"labeler": "people", "count": 2, "size": 6, "weigh_labelers": True}
    people, folder = replace(make_recipe(tmp_path), rounds=rounds), tmp_path / "run"
    run(people, folder)
    place = folder / "round-2" / "feedback"
    samples, labels = place / "samples.jsonl", place / "labels.jsonl"
    assert f"rlhf-recipes label {samples} --labels {labels}" in capsys.readouterr().out.replace("\n", "")

    # Both like short answers, and Bob cannot tell those of four words or more apart.
    tastes = {"Ann": len, "Bob": lambda text: min(len(text), 12)}
    with serving(samples, overlap=0.5) as link:
        pages = {name: opened(link, name) for name in tastes}
        for turn in range(6):
            for name, page in pages.items():
                texts = shown(page)
                if not texts:
                    continue
                press(page, keys([tastes[name](text) for text in texts]))
                done(page, turn + 1)
    found = read_labels([labels])
    by = {name: {row["id"] for row in found if row["labeler"] == name} for name in tastes}
    assert len(by["Ann"] & by["Bob"]) == 3 and len(by["Ann"] | by["Bob"]) == 6
    for row in found:
        taste = [tastes[row["labeler"]](text) for text in row["responses"]]
        for (i, one), (j, other) in combinations(enumerate(row["ranking"]), 2):
            assert (one > other) - (one < other) == (taste[i] > taste[j]) - (taste[i] < taste[j])

    weighted = place / "weighted.jsonl"
    main_cli(["agreement", str(labels), "--out", str(weighted), "--json"])
    numbers = json.loads(capsys.readouterr().out)
    assert len(read(weighted)) == len(found) and all(row["weight"] > 0 for row in read(weighted))
    assert {"Ann", "Bob"} <= numbers["labelers"].keys()

    before = safetensors.torch.load_file(folder / "ppo" / "policy" / "adapter_model.safetensors")
    assert "ppo_2" in run(people, folder)["models"]
    report = json.loads((folder / "round-2" / "manifest.json").read_text())["stages"]["reward"]["data"]
    ties = sum(len(set(row["ranking"])) == 1 for row in found)
    assert read(place / "labels.trained.jsonl") == read(weighted)
    assert report["rows"] == 40 + len(found) and report["dropped"].get("all tied", 0) == ties
    after = safetensors.torch.load_file(folder / "round-2" / "ppo" / "policy" / "adapter_model.safetensors")
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert (folder / "round-2" / "reward" / "card.md").is_file()
