"""`real_model.py` whole in a small setting: on random weights that know the form of a text, and on the real ones."""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from support.paths import SHARED
from support.small import small_base
from support.worded import read, write

pytest.importorskip("vaderSentiment", reason="VADER is not installed: pip install 'rlhf_recipes[sentiment]'")

sys.path.insert(0, str(Path(__file__).parent))
real_model: Any = importlib.import_module("real_model")

# Where ../shared/models/get_smollm2.py was told to write it.
SMOLLM2 = Path(os.environ.get("SMOLLM2") or SHARED / "models" / "SmolLM2-135M-Instruct")
QUESTIONS = ["Is it late?", "Who are you?", "What is good?", "Can I go?", "Where is Rome?", "Do you like me?"]


def run(model: str, folder: Path, *words: str) -> None:
    rows = [
        {"prompt": f"\n\nHuman: {i}. {QUESTIONS[i % 6]}\n\nAssistant: No.\n\nHuman: Oh.\n\nAssistant:"}
        for i in range(60)
    ]
    rows = [{**row, "chosen": " Yes, it is.", "rejected": " No."} for row in rows] if "smollm2-hh" in words else rows
    questions = write(folder / "questions.jsonl", rows)
    real_model.main([*words, "--small", "--model", model, "--data", str(questions), "--out", str(folder / "run")])


@pytest.mark.long
def test_one_command_goes_from_the_base_to_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(small_base(), tmp_path)
    printed = capsys.readouterr().out
    assert "[1/7] the base answers: 0% done" in printed and "[7/7] the evaluation" in printed
    for model in ("base", "sft", "ppo"):
        assert f"| {model} | " in printed and f"- {model} (" in printed
    demonstrations = read(tmp_path / "run" / "feedback" / "base.jsonl")
    labels = read(tmp_path / "run" / "feedback" / "samples.labels.jsonl")
    assert len(demonstrations) == 24 and len(labels) == 16
    assert {row["labeler"] for row in labels} == {real_model.LABELER}
    assert {origin["model"] for row in labels for origin in row["origins"]} == {"sft"}
    run(small_base(), tmp_path)
    assert "[" not in capsys.readouterr().out.partition("Labelers")[0], "again, nothing is left to do"


@pytest.mark.long
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="SmolLM2 is not beside the repository; $SMOLLM2 may name its folder")
@pytest.mark.parametrize("name", real_model.EXPERIMENTS)
def test_they_run_on_the_real_weights(name: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"\n\nHuman: {i}?\n\nAssistant:", "chosen": " Yes.", "rejected": " No."} for i in range(12)]
    heldout = write(tmp_path / "heldout.jsonl", rows)
    run(str(SMOLLM2), tmp_path, "--recipe", name, "--heldout-data", str(heldout))
    assert len(read(tmp_path / "run" / "evaluation" / "answers.jsonl")) == 8 * len(real_model.EXPERIMENTS[name].models)


@pytest.mark.long
def test_reward_models_are_measured_on_comparisons_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"\n\nHuman: {i}?\n\nAssistant:", "chosen": " Yes.", "rejected": " No."} for i in range(12)]
    heldout = write(tmp_path / "heldout.jsonl", rows)
    run(small_base(), tmp_path, "--recipe", "smollm2-hh", "--heldout-data", str(heldout))
    printed = capsys.readouterr().out
    assert "[1/6] a reward model from all comparisons: 0% done" in printed and "[6/6] the evaluation" in printed
    assert printed.count("Right on comparisons, 12 rows") == 4, "as it is measured, and at the end"
    of_all, of_parts = (tmp_path / name / "evaluation" / "comparisons.json" for name in ("run-all", "run"))
    judges = [json.loads(path.read_text())["judges"].keys() for path in (of_all, of_parts)]
    assert [set(names) for names in judges] == [{"reward"}, {"reward", "judge"}]
    assert "| ppo | " in printed and "Where the policy is worst by judge" in printed


def test_ppo_gets_the_episodes_that_the_hours_hold() -> None:
    parts = real_model.sentiment_parts(
        real_model.Job("smollm2-sentiment", (), Path("nowhere"), 0, ()), real_model.Sizes(), 64
    )
    others = sum(part.seconds for part in parts if part.title != "PPO")
    hours = (others + 1000 * 0.7) / 3600
    assert real_model.choose_episodes(parts, hours, 1.0, 0.7, 64) == 960, "1000 in whole updates"
    assert real_model.choose_episodes(parts, 2 * hours, 2.0, 0.7, 64) == 960, "on a machine of half the speed"
    assert real_model.choose_episodes(parts, 0.01, 1.0, 0.7, 64) == 640 and real_model.FEWEST == 640
