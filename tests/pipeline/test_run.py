"""A whole run: what its folder holds, and how it is skipped, resumed and refused."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from math import isfinite
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.hostile import Payload
from support.paths import ROOT
from support.run_folder import manifest_of, mark_running, rows_of, states, write_rows
from support.tiny_models import save_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

from rlhf_recipes import Base, DPOStage, Lora, PPOStage, Recipe, Stage, replace, run
from rlhf_recipes.cli.command import exit_codes
from rlhf_recipes.model.base import check_adapter, model_path
from rlhf_recipes.model.memory import peak_memory_mib, reset_peak_memory
from rlhf_recipes.model.shared import HEAD
from rlhf_recipes.pipeline.check import check_recipe
from rlhf_recipes.records.checkpoints import SEAL, last_checkpoint
from rlhf_recipes.records.folder import checkpoint_step
from rlhf_recipes.records.lock import held
from rlhf_recipes.records.manifest import Manifest, open_run
from rlhf_recipes.stages.reward.adapters import PROBES
from rlhf_recipes.stages.stop import Stopped

STORIES = ROOT.parent / "shared" / "models" / "stories260K"
ADAPTERS = ("sft", "reward", "ppo/policy", "ppo/critic")
WEIGHTS = "adapter_model.safetensors"
STAGES = ("sft", "reward", "ppo")  # of the recipe below
PPO_METRICS = {
    "objective/kl",
    "objective/entropy",
    "objective/scores",
    "objective/rlhf_reward",
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "loss/policy_avg",
    "loss/value_avg",
    "val/ratio",
    "val/first_pass_log_ratio_max",
    "val/explained_variance",
    "response_length",
    "without_eos",
    "tokens_per_second",
    "time/generate",
    "time/score",
    "time/update",
}
GOLD = """
def length(completions, **columns):
    return [len(text.split()) for text in completions]
"""


def words(rng: random.Random, count: int) -> str:
    return " ".join(f"w{rng.randrange(4, 64)}" for _ in range(count))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A recipe of three stages over a tiny random model and random rows, a few steps each."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = random.Random(0)
    save_model(folder / "model")
    (folder / "gold.py").write_text(GOLD)
    rows = [{key: words(rng, 5) for key in ("prompt", "completion")} for _ in range(120)]
    write_rows(folder / "sft.jsonl", rows)
    rows = [{key: words(rng, 5) for key in ("prompt", "chosen", "rejected")} for _ in range(120)]
    write_rows(folder / "reward.jsonl", rows)
    write_rows(
        folder / "ppo.jsonl",
        [{"prompt": words(rng, rng.randint(2, 6)), "topic": i, "user_ids": "u1"} for i in range(120)],
    )
    args = {
        "per_device_train_batch_size": 8,
        "gradient_checkpointing": False,
        "learning_rate": 1e-3,
        "logging_steps": 2,
    }
    ppo = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_mini_batches": 2}
    ppo |= {"gradient_checkpointing": False, "learning_rate": 1e-3, "response_length": 8, "kl_coef": 0.05}
    return Recipe(
        name="small",
        base=Base(str(folder / "model")),
        lora=Lora(r=4, alpha=8, dropout=0.1),
        sft=Stage(str(folder / "sft.jsonl"), heldout=0.1, args={**args, "max_steps": 4, "save_steps": 2}),
        reward=Stage(str(folder / "reward.jsonl"), heldout=0.1, args={**args, "max_steps": 4, "save_steps": 2}),
        ppo=PPOStage(
            str(folder / "ppo.jsonl"),
            heldout=0.1,
            args={**ppo, "max_steps": 3, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 2},
        ),
        gold=f"{folder / 'gold.py'}:length",
        tracker="none",
    )


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished run's folder, and its summary. Tests that change the folder work on a copy."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, run(recipe, folder)


@pytest.fixture
def copied(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    return shutil.copytree(finished[0], tmp_path / "run")


def comparison(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The samples of the three models at the end, without those of evaluations during training."""
    return samples[[s["model"] for s in samples].index("base") :]


def ppo_updates(folder: Path) -> list[dict[str, Any]]:
    return [row for row in rows_of(folder, "ppo") if "objective/kl" in row]


def reproducible(folder: Path) -> list[dict[str, Any]]:
    """The metrics without clocks, and without what the libraries count from the start of the process."""
    left_out = (
        "time/",
        "memory/",
        "tokens_per_second",
        "train_",
        "eval_runtime",
        "eval_samples_per",
        "eval_steps_per",
        "num_tokens",
        "eval_num_tokens",
        "eval_model_preparation_time",
    )
    return [{k: v for k, v in row.items() if not k.startswith(left_out)} for row in rows_of(folder)]


def weights(folder: Path) -> dict[str, bytes]:
    return {adapter: (folder / adapter / WEIGHTS).read_bytes() for adapter in ADAPTERS}


# --- What a run leaves ------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_run_in_float16(recipe: Recipe, tmp_path: Path, quantization: str | None) -> None:
    half = replace(recipe, base={"dtype": "float16", "quantization": quantization})
    summary: Any = run(half, tmp_path)
    rows = [row for row in rows_of(tmp_path) if "loss" in row]
    assert len(rows) == 2 + 2 + 3 and all(isfinite(row["loss"]) and row["skipped_steps"] == 0 for row in rows)
    assert all(row["val/first_pass_log_ratio_max"] == 0 for row in ppo_updates(tmp_path))
    assert {tensor.dtype for adapter in ADAPTERS for tensor in load_file(tmp_path / adapter / WEIGHTS).values()} == {
        torch.float32
    }
    assert summary["models"]["sft"]["kl"] == 0


def test_a_run_writes_its_recipe_and_manifest(recipe: Recipe, finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    assert json.loads((folder / "recipe.json").read_text())["ppo"]["args"]["kl_coef"] == 0.05
    manifest = manifest_of(folder)
    assert {"python", "torch", "trl", "peft", "transformers", "rlhf_recipes"} <= manifest["versions"].keys()
    assert manifest["base"]["dtype"] == "float32" and manifest["base"]["model"].startswith("sha256:")
    for adapter in ADAPTERS:
        assert json.loads((folder / adapter / "base.json").read_text()) == manifest["base"]
    assert list(manifest["stages"]) == ["sft", "reward", "ppo"]
    for record in manifest["stages"].values():
        assert record["state"] == "done"
        assert record["seconds"] > 0 and record["peak_memory_mib"] > 0
        assert record["device"].endswith(f"CPU, {os.cpu_count()} cores") or torch.cuda.is_available()
        report = record["data"]
        assert report["rows"] == report["used"] == report["train"] + report["heldout"] == 120
        assert report["heldout"] > 0 and report["dropped"] == {}


def test_the_reward_cards_warnings_are_printed(
    recipe: Recipe, finished: tuple[Path, dict[str, Any]], copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = json.loads((finished[0] / "reward" / "card.json").read_text())
    assert manifest_of(finished[0])["stages"]["reward"]["results"]["card"] == card
    mark_running(copied, "reward")
    run(recipe, copied)
    printed = " ".join(capsys.readouterr().out.split())
    assert card["warnings"] and all(f"warning: {text}" in printed for text in card["warnings"])


def test_every_metric_of_a_run_is_recorded(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    rows = rows_of(folder)
    assert list(dict.fromkeys(row["stage"] for row in rows)) == ["sft", "reward", "ppo"]
    assert all(isinstance(row["step"], int) for row in rows)
    assert [row["step"] for row in rows_of(folder, "sft") if "loss" in row] == [2, 4]
    updates = ppo_updates(folder)
    assert [row["step"] for row in updates] == [1, 2, 3]
    assert [row["episode"] for row in updates] == [16, 32, 48]
    for row in updates:
        assert row.keys() >= PPO_METRICS
        assert all(isfinite(row[name]) for name in PPO_METRICS)
    # Before the first update the policy is the reference, and on its first mini-batch the one that sampled.
    assert updates[0]["objective/kl"] == 0 and updates[1]["objective/kl"] != 0
    assert updates[0]["val/ratio"] == pytest.approx(1, abs=0.1)
    assert {update["val/first_pass_log_ratio_max"] for update in updates} == {0}
    assert [row["step"] for row in rows_of(folder, "ppo") if "eval_gold" in row] == [2, 3]


def test_samples_compare_three_models_on_the_same_prompts(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    samples = rows_of(folder, None, "samples.jsonl")
    assert {s["stage"] for s in samples} == {"ppo"}
    last = comparison(samples)
    prompts = [[s["prompt"] for s in last if s["model"] == model] for model in ("base", "sft", "ppo")]
    assert prompts[0] == prompts[1] == prompts[2] != []
    assert {(s["step"], s["model"]) for s in samples[: -len(last)]} == {(2, "ppo"), (3, "ppo")}
    for sample in samples:
        assert sample["gold"] == len(sample["completion"].split()) and isfinite(sample["score"])
    assert all(sample["kl"] == 0 for sample in samples if sample["model"] == "sft")


def test_the_summary_is_what_the_stages_found(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    assert json.loads((folder / "summary.json").read_text()) == summary
    samples = comparison(rows_of(folder, "ppo", "samples.jsonl"))
    for name, key in (("gold_score", "gold"), ("reward_score", "score"), ("response_length", "response_length")):
        for model in ("base", "sft", "ppo"):
            of_model = [s[key] for s in samples if s["model"] == model]
            assert summary[name][model] == pytest.approx(sum(of_model) / len(of_model))
    for name in ("win_rate_vs_sft", "reward_win_rate_vs_sft"):
        wins = summary[name]
        assert 0 <= wins["low"] <= wins["rate"] <= wins["high"] <= 1 and wins["prompts"] == len(samples) / 3
    assert summary["sft_heldout_loss"] > 0 and 0 <= summary["reward_model_accuracy"] <= 1 and isfinite(summary["kl"])
    assert summary["without_eos"].keys() == {"base", "sft", "ppo"}
    assert summary["seconds"].keys() == summary["peak_memory_mib"].keys() == {"sft", "reward", "ppo"}


def test_the_adapters_load_with_plain_peft(recipe: Recipe, finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    ids = torch.tensor([[5, 6, 7, 8]])
    for adapter in ADAPTERS:
        suffixes = {path.suffix for path in (folder / adapter).iterdir() if path.is_file()}
        assert not suffixes & {".bin", ".pt", ".pth", ".pkl"}, f"{adapter} must hold safetensors only"
        if adapter in ("sft", "ppo/policy"):
            base = AutoModelForCausalLM.from_pretrained(recipe.base.model)
        else:
            base = AutoModelForSequenceClassification.from_pretrained(recipe.base.model, num_labels=1)
        with torch.no_grad():
            plain = base(input_ids=ids).logits
            adapted = PeftModel.from_pretrained(base, str(folder / adapter)).eval()(input_ids=ids).logits
        assert torch.isfinite(adapted).all() and not torch.equal(plain, adapted)


def test_the_saved_reward_model_gives_its_probe_scores(recipe: Recipe, finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    probes = json.loads((folder / "reward" / "probe.json").read_text())
    base = AutoModelForSequenceClassification.from_pretrained(recipe.base.model, num_labels=1)
    model = PeftModel.from_pretrained(base, str(folder / "reward")).eval()
    with torch.no_grad():
        scores = [model(input_ids=torch.tensor([ids])).logits.item() for ids in probes["input_ids"]]
    assert scores == pytest.approx(probes["scores"], abs=1e-5)
    assert len(set(scores)) > 1


# --- Running again ----------------------------------------------------------------------------------------------------


def test_running_again_skips_what_is_finished(recipe: Recipe, finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished

    def stamps() -> dict[Path, int]:
        trained = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".json", ".html"))
        trained = (path for path in trained if path.name not in ("README.md", ".lock"))
        return {path: path.stat().st_mtime_ns for path in trained}

    before, page = stamps(), (folder / "report.html").read_bytes()
    assert run(recipe, folder) == summary
    assert stamps() == before and (folder / "report.html").read_bytes() == page


def test_rows_of_a_finished_stage_that_are_gone_are_said(
    recipe: Recipe, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(recipe, copied)
    assert "warning" not in capsys.readouterr().err
    for name in ("metrics.jsonl", "samples.jsonl"):
        (copied / name).write_bytes(b"")
    run(recipe, copied)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [line.partition(" any more")[0] for line in said] == [
        f"warning: {copied}/metrics.jsonl has no rows of sft and reward and ppo",
        f"warning: {copied}/samples.jsonl has no rows of ppo",
    ]
    (copied / "metrics.jsonl").write_bytes(bytes(100))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: holds NUL bytes"):
        run(recipe, copied)


def test_a_changed_recipe_is_refused_in_an_old_folder(recipe: Recipe, copied: Path) -> None:
    with pytest.raises(ValueError, match=r"kl_coef: 0\.05 there, 0\.2 here.*--run-dir"):
        run(replace(recipe, ppo={"kl_coef": 0.2}), copied)
    with pytest.raises(ValueError, match=r"lora\.r: 4 there, 8 here; seed: 0 there, 1 here"):
        run(replace(recipe, lora={"r": 8}, seed=1), copied)
    with pytest.raises(ValueError, match="limit: None there, 50 here"):
        run(replace(recipe, sft={"limit": 50}), copied)


def test_another_tracker_is_the_same_recipe(
    recipe: Recipe, copied: Path, finished: tuple[Path, dict[str, Any]]
) -> None:
    assert run(replace(recipe, tracker="wandb"), copied) == finished[1]


def test_a_mistake_in_the_data_can_be_corrected_in_the_same_folder(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.jsonl"):
        run(replace(recipe, ppo={"data": "absent.jsonl"}), tmp_path / "run")
    run(recipe, tmp_path / "run", stages=["sft"])


def test_stages_run_one_at_a_time(recipe: Recipe, tmp_path: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    folder = tmp_path / "run"
    summary = run(recipe, folder, stages=["sft"])
    assert states(folder) == {"sft": "done"}
    assert summary["sft_heldout_loss"] == finished[1]["sft_heldout_loss"] and summary["reward_score"] == {}
    with pytest.raises(ValueError, match="Stage 'ppo' builds on 'reward', which is not finished"):
        run(recipe, folder, stages=["ppo"])
    run(recipe, folder, stages=["reward"])
    run(recipe, folder, stages=["ppo"])
    assert weights(folder) == weights(finished[0])


def test_an_unknown_stage_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no stage 'rewards'. Did you mean reward\?"):
        run(recipe, tmp_path / "run", stages=["rewards"])
    with pytest.raises(ValueError, match="has no stage 'sft'"):
        run(replace(recipe, sft=None), tmp_path / "run", stages=["sft"])
    assert not (tmp_path / "run").exists()


# --- Resuming ---------------------------------------------------------------------------------------------------------


def test_a_torn_checkpoint_is_passed_over(recipe: Recipe, copied: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    for stage, name, tear in (
        ("sft", "rng_state.pth", Path.unlink),
        ("reward", "optimizer.pt", truncate),
        ("ppo", "critic/adapter_model.safetensors", truncate),
    ):
        newest = Path(last_checkpoint(copied / stage) or "")
        tear(newest / name)
        older = Path(last_checkpoint(copied / stage) or "")
        assert older != newest and not newest.exists() and older.parent == copied / stage
        mark_running(copied, stage)
    run(recipe, copied)
    assert weights(copied) == weights(finished[0])
    assert by_stage(reproducible(copied)) == by_stage(reproducible(finished[0]))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_checkpoint_that_was_tampered_with_runs_nothing(
    recipe: Recipe, copied: Path, tmp_path: Path, stage: str, name: str
) -> None:
    shutil.rmtree(copied / stage / "checkpoint-4")
    (copied / stage / PROBES).unlink(missing_ok=True)  # the reward model is finished where it has them
    mark_running(copied, stage)
    file = copied / stage / "checkpoint-2" / name
    assert file.is_file()
    torch.save({"state": Payload(tmp_path / "mark")}, file)
    (file.parent / SEAL).unlink()  # whoever tampers with it can write one of his own
    with pytest.raises(ValueError, match=r"checkpoint-2: a file of it is damaged, or wants to run code"):
        run(recipe, copied)
    assert not (tmp_path / "mark").exists()


def test_of_a_checkpoint_no_other_adapter_is_loaded(recipe: Recipe, copied: Path) -> None:
    checkpoint = copied / "sft" / "checkpoint-4"
    theirs = shutil.copytree(checkpoint, copied / "theirs").rename(checkpoint / "theirs")
    config = json.loads((theirs / "adapter_config.json").read_text())
    (theirs / "adapter_config.json").write_text(json.dumps(config | {"megatron_core": "their.module"}))
    mark_running(copied, "sft")
    with pytest.raises(ValueError, match=r"theirs/adapter_config\.json: megatron_core='their\.module' is none of"):
        run(recipe, copied)


def test_a_damaged_adapter_is_named_and_the_next_start_writes_it_anew(
    recipe: Recipe, copied: Path, finished: tuple[Path, dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    truncate(copied / "sft" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"sft/adapter_model\.safetensors is damaged .*run the same recipe again"):
        check_adapter(copied / "sft")
    (copied / "sft" / "adapter_model.safetensors").unlink()
    truncate(copied / "reward" / "adapter_model.safetensors")  # of a stage that was not done yet
    mark_running(copied, "reward")
    (copied / "ppo" / "policy" / "base.json").write_text("")
    run(recipe, copied)
    assert {message for message in caplog.messages if "once more" in message} == {
        f"{copied}/sft/adapter_model.safetensors is missing: the stage sft is to be finished once more.",
        f"{copied}/ppo/policy/base.json: not JSON (Expecting value: line 1 column 1 (char 0)). Delete it, or run what "
        "writes it again: the stage ppo is to be finished once more.",
    }
    assert weights(copied) == weights(finished[0])
    assert by_stage(reproducible(copied)) == by_stage(reproducible(finished[0]))


@pytest.mark.parametrize("name", ["probe.json", "score_bias.json"])
def test_a_finished_reward_model_that_lacks_a_file_is_to_be_finished_once_more(tmp_path: Path, name: str) -> None:
    folder, card = tmp_path / "reward", {"demonstrations": {"count": 1, "mean": 0.0, "sd": 0.0, "bias": 0.5}}
    folder.mkdir()
    for each in ("adapter_config.json", "base.json", "probe.json", "score_bias.json"):
        (folder / each).write_text("{}")
    save_file({"weight": torch.zeros(4)}, folder / "adapter_model.safetensors")
    record = {"state": "done", "results": {"card": card}}
    (tmp_path / "manifest.json").write_text(json.dumps({"stages": {"reward": record}}))
    assert Manifest.to_go_on(tmp_path).is_done("reward")
    (folder / name).unlink()
    assert not Manifest.to_go_on(tmp_path).is_done("reward")


@pytest.mark.parametrize("text", ["null", "[]", "{}", "1"])
@pytest.mark.parametrize("name", ["recipe.json", "manifest.json"])
def test_json_of_another_form_is_refused_in_words(recipe: Recipe, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    if (name, text) == ("manifest.json", "{}"):
        assert not Manifest.read(tmp_path).stages
    else:
        with pytest.raises(ValueError, match=name):
            open_run(recipe, tmp_path, [])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def by_stage(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {stage: [row for row in rows if row["stage"] == stage] for stage in STAGES}


def test_a_run_that_was_stopped_after_its_last_step_trains_no_further_and_has_no_row_twice(
    recipe: Recipe, copied: Path, finished: tuple[Path, dict[str, Any]]
) -> None:
    for stage in STAGES:
        mark_running(copied, stage)
    (copied / "ppo" / "checkpoint-1" / "policy").mkdir(parents=True)  # the kill came while it was deleted
    (copied / "ppo" / "checkpoint-1" / "policy" / "adapter_config.json").touch()
    assert run(recipe, copied)["reward_score"] == finished[1]["reward_score"]
    assert not (copied / "ppo" / "checkpoint-1").exists()
    assert weights(copied) == weights(finished[0])
    assert by_stage(reproducible(copied)) == by_stage(reproducible(finished[0]))
    assert rows_of(copied, None, "samples.jsonl") == rows_of(finished[0], None, "samples.jsonl")


def test_the_time_of_a_stage_adds_up_over_restarts(recipe: Recipe, copied: Path) -> None:
    before = manifest_of(copied)["stages"]["sft"]["seconds"]
    mark_running(copied, "sft")
    run(recipe, copied, stages=["sft"])
    assert manifest_of(copied)["stages"]["sft"]["seconds"] > before


def test_no_checkpoint_is_found_where_there_is_none(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "sft") is None
    for number in (9, 10):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_bytes(b"\xff\xfe")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def first_checkpoint(stage_dir: Path, running: Callable[[], bool]) -> Path:
    """Wait for the stage's first checkpoint."""
    deadline = time.monotonic() + 120
    while not (found := [path for path in stage_dir.glob("checkpoint-*/trainer_state.json") if whole_json(path)]):
        assert running(), f"the run ended before {stage_dir} had a checkpoint"
        assert time.monotonic() < deadline, f"no checkpoint in {stage_dir}"
        time.sleep(0.003)
    return found[0].parent


def whole_json(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text()))
    except ValueError:  # it is being written
        return False


@pytest.fixture(scope="module")
def longer(recipe: Recipe) -> Recipe:
    """Steps enough that a signal sent at the first checkpoint comes before the end. Every checkpoint is kept."""
    keep = {"save_total_limit": 100}
    args = {**keep, "max_steps": 80, "save_steps": 8, "logging_steps": 4}
    return replace(recipe, sft=args, reward=args, ppo={**keep, "max_steps": 8, "save_steps": 1, "eval_strategy": "no"})


@pytest.mark.long  # tests/faults has kills in a smaller run
def test_a_killed_run_resumes_to_the_same_bytes(longer: Recipe, tmp_path: Path) -> None:
    # Forked from a server that has imported the package, a run starts at once. Signals reach it as any other process.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rlhf_recipes.pipeline.run"])

    def start(run_dir: Path) -> ForkServerProcess:
        process = context.Process(target=run, args=(longer, run_dir), daemon=True)
        process.start()
        return process

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    uninterrupted = start(whole)
    checkpoints = {}
    for stage in STAGES:
        process = start(killed)
        checkpoint = first_checkpoint(killed / stage, process.is_alive)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert states(killed)[stage] == "running", f"the kill must land within {stage}"
        checkpoints[checkpoint] = (checkpoint / "trainer_state.json").stat().st_mtime_ns
    for process in (start(killed), uninterrupted):
        process.join(timeout=120)
        assert process.exitcode == 0

    assert set(states(killed).values()) == {"done"}
    for checkpoint, written in checkpoints.items():
        assert (checkpoint / "trainer_state.json").stat().st_mtime_ns == written, "the stage began again at its start"
    assert weights(killed) == weights(whole)
    assert reproducible(killed) == reproducible(whole)
    assert rows_of(killed, None, "samples.jsonl") == rows_of(whole, None, "samples.jsonl")


class Signals(TrainerCallback):
    """Sends this process signals in the middle of a stage's step."""

    def __init__(self, stage: str, step: int, *signals: signal.Signals) -> None:
        self.stage, self.step, self.signals = stage, step, signals

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if Path(args.output_dir).name == self.stage and state.global_step == self.step - 1:
            for number in self.signals:
                os.kill(os.getpid(), number)


def test_a_run_that_is_told_to_stop_does_so_behind_a_checkpoint_and_goes_on_to_the_same_bytes(
    recipe: Recipe, finished: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage, number in (("sft", signal.SIGINT), ("reward", signal.SIGTERM), ("ppo", signal.SIGTERM)):
        with pytest.raises(SystemExit) as ended, exit_codes():
            run(recipe, tmp_path, callbacks=[Signals(stage, 1, number)])
        assert ended.value.code == 128 + number
        assert "run the same command again to resume" in capsys.readouterr().err
        assert states(tmp_path)[stage] == "running"
        assert [path.name for path in (tmp_path / stage).glob("checkpoint-*")] == ["checkpoint-1"], "beside save_steps"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    # The clock has come: the stage that is under way goes no further.
    with pytest.raises(Stopped) as stopped:
        run(recipe, tmp_path, stop_at=datetime(2020, 1, 1))
    assert stopped.value.code == 143 and last_checkpoint(tmp_path / "ppo") == str(tmp_path / "ppo" / "checkpoint-1")
    run(recipe, tmp_path, stop_at=datetime(2220, 1, 1))
    assert weights(tmp_path) == weights(finished[0])


class StopsInside(TrainerCallback):
    """Sends this process a signal in the middle of a stage's step, or of the evaluation behind it."""

    def __init__(self, event: str, step: int) -> None:
        self.step, self.sent = step, False
        setattr(self, event, self.send)

    def send(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("stage", ["sft", "reward", pytest.param("dpo", marks=pytest.mark.long)])
def test_a_step_and_an_evaluation_are_left_in_the_middle_and_come_again_to_the_same_bytes(
    recipe: Recipe, stage: str, tmp_path: Path
) -> None:
    args = {**recipe.sft.args, "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    args |= {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    kind, data = (DPOStage if stage == "dpo" else Stage), (recipe.sft if stage == "sft" else recipe.reward).data
    stages: Any = {stage: kind(data, heldout=0.1, args=args)}
    recipe = Recipe("small", recipe.base, lora=recipe.lora, tracker="none", **stages)
    folders = [tmp_path / name for name in ("whole", "stopped")]
    run(recipe, folders[0])
    # In the second step, in the evaluation behind it, and in the one behind the last.
    for event, step in (("on_substep_end", 1), ("on_prediction_step", 2), ("on_prediction_step", 4)):
        with pytest.raises(Stopped):
            run(recipe, folders[1], callbacks=[StopsInside(event, step)])
        last = last_checkpoint(folders[1] / stage)
        assert last == str(folders[1] / stage / f"checkpoint-{step}")
    run(recipe, folders[1])
    whole, stopped = ((folder / stage / WEIGHTS).read_bytes() for folder in folders)
    assert stopped == whole
    rows = [[row for row in reproducible(folder) if "eval_loss" in row] for folder in folders]
    assert [row["step"] for row in rows[0]] == [2, 4, 4] and rows[0] == rows[1]
    # A row for the step at which it was stopped as well: the other run's next one is the mean of both.
    losses = [{row["step"]: row["loss"] for row in rows_of(folder) if "loss" in row} for folder in folders]
    assert losses[0].keys() == {2, 4} and losses[1].keys() == {1, 2, 4}
    assert (losses[1][1] + losses[1][2]) / 2 == pytest.approx(losses[0][2], rel=1e-6)
    assert losses[1][4] == losses[0][4]


def test_the_clock_ends_a_stage_that_has_only_its_comparison_left(recipe: Recipe, copied: Path) -> None:
    manifest = Manifest.read(copied)
    manifest.stages["ppo"]["state"] = "running"
    manifest.write(copied)
    with pytest.raises(Stopped):
        run(recipe, copied, stop_at=datetime(2020, 1, 1))
    assert states(copied)["ppo"] == "running"


def test_a_second_signal_stops_at_once(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(Stopped) as stopped:
        run(recipe, tmp_path, callbacks=[Signals("sft", 1, signal.SIGTERM, signal.SIGINT)])
    assert stopped.value.code == 130 and not list((tmp_path / "sft").glob("checkpoint-*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 700 KiB: the SFT stage fits, and somewhere in the reward stage it is full."""
    mounted = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("a disk can be mounted by root alone")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_a_full_disk_is_said_and_nothing_finished_is_lost(
    recipe: Recipe, finished: tuple[Path, dict[str, Any]], small_disk: Path
) -> None:
    with pytest.raises(ValueError, match=r": the disk is full: make room .* then run the same again\.$"):
        run(recipe, small_disk / "run")
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    run(recipe, small_disk / "run")
    assert weights(small_disk / "run") == weights(finished[0])


def test_a_folder_in_use_is_refused(recipe: Recipe, copied: Path) -> None:
    with held(copied), pytest.raises(ValueError, match=rf"{copied} is in use by process {os.getpid()} of"):
        run(recipe, copied)


# --- Recipes with fewer stages ----------------------------------------------------------------------------------------


def frozen(recipe: Recipe) -> Recipe:
    """With a learning rate of zero, PPO saves the policy and the critic as they started."""
    return replace(recipe, ppo={"learning_rate": 0.0, "max_steps": 1, "save_strategy": "no", "eval_strategy": "no"})


def test_without_a_reward_model_the_critic_starts_from_sft_with_a_zero_head(recipe: Recipe, tmp_path: Path) -> None:
    assert recipe.gold is not None
    summary = run(frozen(replace(recipe, reward=None, ppo={"reward_funcs": (recipe.gold,)})), tmp_path)
    assert summary["reward_score"] == summary["gold_score"] and summary["reward_model_accuracy"] is None
    sft, policy, critic = (load_file(tmp_path / name / WEIGHTS) for name in ("sft", "ppo/policy", "ppo/critic"))
    assert not critic.pop(HEAD).any()
    assert all(torch.equal(sft[key], state[key]) for state in (policy, critic) for key in sft)
    assert sft.keys() == policy.keys() == critic.keys()


def test_without_sft_the_policy_starts_from_the_base_and_the_critic_from_the_reward_model(
    recipe: Recipe, tmp_path: Path
) -> None:
    summary = run(frozen(replace(recipe, sft=None)), tmp_path)
    assert summary["sft_heldout_loss"] is None and summary["reward_model_accuracy"] is not None
    reward, policy, critic = (load_file(tmp_path / name / WEIGHTS) for name in ("reward", "ppo/policy", "ppo/critic"))
    assert not any(tensor.any() for key, tensor in policy.items() if "lora_B" in key)
    assert reward.keys() == critic.keys() and all(torch.equal(reward[key], critic[key]) for key in reward)
    assert summary["kl"] == 0 and summary["gold_score"]["base"] == summary["gold_score"]["ppo"]


def test_ppo_without_any_reward_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no reward: add a `reward` stage or set ppo\.reward_funcs"):
        run(replace(recipe, reward=None), tmp_path)


# --- Errors come before weights ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weightless(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The recipe over a model folder without weights: loading them would raise another error."""
    folder = shutil.copytree(recipe.base.model, tmp_path_factory.mktemp("weightless") / "model")
    (folder / "model.safetensors").unlink()
    return replace(recipe, base={"model": str(folder)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sft": {"learning_rat": 1e-3}}, r"no key sft\.learning_rat\. Did you mean learning_rate\?"),
        ({"reward": {"max_lenght": 8}}, r"no key reward\.max_lenght\. Did you mean max_length\?"),
        ({"ppo": {"kl_coeff": 0.1}}, r"no key ppo\.kl_coeff\. Did you mean kl_coef\?"),
        ({"ppo": {"kl_coef": "high"}}, r"ppo\.kl_coef must be 0 or more, not 'high'"),
        ({"ppo": {"kl_estimator": "k2"}}, r"ppo\.kl_estimator must be .*k1.*k3.*'k2'"),
        ({"ppo": {"lam": 1.5}}, r"ppo\.lam must be from 0 to 1, not 1\.5"),
        ({"sft": {"args": {"output_dir": "x"}}}, r"sft\.output_dir is set by the runner: --run-dir"),
        ({"reward": {"args": {"seed": 3}}}, r"reward\.seed is set by the runner"),
        ({"reward": {"data": "absent.jsonl"}}, r"reward\.data: .*absent\.jsonl"),
        ({"ppo": {"heldout": 0.0}}, r"ppo\.data: no row of .*ppo\.jsonl is held out.* ppo\.heldout"),
        ({"reward": {"heldout_limit": 0}}, r"reward\.heldout_limit above 0"),
        ({"gold": "gold"}, r"'gold' names no function\. Write module:function"),
        ({"gold": "absent_module:gold"}, r"there is no module 'absent_module'"),
        ({"ppo": {"reward_funcs": ("json:score",)}}, r"json has no function 'score'"),
        ({"base": {"chat_template": "transcrpt"}}, r"base\.chat_template: 'transcrpt'.* Did you mean transcript\?"),
    ],
)
def test_a_mistake_is_found_before_weights_are_loaded(
    weightless: Recipe, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(replace(weightless, **changes), tmp_path / "run")


def test_mixed_formats_are_found_before_weights_are_loaded(weightless: Recipe, tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": f"w{i}"}]} for i in range(4, 60)]
    write_rows(tmp_path / "chat.jsonl", rows)
    with pytest.raises(ValueError, match=r"sft\.data is plain text, reward\.data is plain text, ppo\.data is messages"):
        run(replace(weightless, ppo={"data": str(tmp_path / "chat.jsonl")}), tmp_path / "run")


def test_a_recipe_without_a_mistake_gets_as_far_as_the_weights(weightless: Recipe, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"model\.safetensors"):
        run(weightless, tmp_path / "run")


def test_a_reward_model_that_was_changed_on_disk_stops_ppo(recipe: Recipe, copied: Path) -> None:
    shutil.rmtree(copied / "ppo")
    mark_running(copied, "ppo")
    state = load_file(copied / "reward" / WEIGHTS)
    state[HEAD] = 2 * state[HEAD]
    save_file(state, copied / "reward" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="scores its probe rows differently"):
        run(recipe, copied)


def test_adapters_of_another_base_are_refused(recipe: Recipe, copied: Path) -> None:
    found = json.loads((copied / "sft" / "base.json").read_text())
    (copied / "sft" / "base.json").write_text(json.dumps(found | {"quantization": "int8"}))
    mark_running(copied, "reward")
    shutil.rmtree(copied / "reward")
    with pytest.raises(ValueError, match="another base \\(quantization: int8 there, None here\\)"):
        run(recipe, copied)


# --- Bases ------------------------------------------------------------------------------------------------------------


def test_a_run_on_a_4_bit_base_is_finite(recipe: Recipe, tmp_path: Path) -> None:
    few = {"max_steps": 2}
    summary = run(replace(recipe, base={"quantization": "nf4"}, sft=few, reward=few, ppo=few), tmp_path)
    assert manifest_of(tmp_path)["base"]["quantization"] == "nf4"
    updates = ppo_updates(tmp_path)
    assert len(updates) == 2 and all(isfinite(row[name]) for row in updates for name in PPO_METRICS)
    assert updates[0]["objective/kl"] == 0
    assert all(isfinite(score) for score in summary["reward_score"].values())
    for adapter in ADAPTERS:
        state = load_file(tmp_path / adapter / WEIGHTS)
        assert state and all(torch.isfinite(tensor).all() for tensor in state.values())
        assert all("lora_" in key or key == HEAD for key in state), "the base's weights stay out of the adapters"


def ppo_again(recipe: Recipe, folder: Path, **changes: Any) -> dict[str, Any]:
    """Run only the PPO stage anew, with other settings, in a copy of a finished run."""
    shutil.rmtree(folder / "ppo")
    (folder / "recipe.json").unlink()
    manifest = manifest_of(folder)
    del manifest["stages"]["ppo"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return run(replace(recipe, **changes), folder, stages=["ppo"])


@pytest.mark.parametrize("critic", ["reward", "sft", "head"])
def test_a_critic_starts_where_it_is_told(recipe: Recipe, copied: Path, critic: str) -> None:
    still = {"critic": critic, "learning_rate": 0.0, "max_steps": 1, "reward_funcs": (recipe.gold,)}
    ppo_again(recipe, copied, ppo=still)
    found, sft = load_file(copied / "ppo" / "critic" / WEIGHTS), load_file(copied / "sft" / WEIGHTS)
    head = found.pop(HEAD)
    if critic == "reward":
        reward = load_file(copied / "reward" / WEIGHTS)
        assert torch.equal(head, reward[HEAD]) and all(torch.equal(found[key], reward[key]) for key in found)
        bias = (copied / "reward" / "score_bias.json").read_text()
        assert (
            json.loads((copied / "ppo" / "critic" / "score_bias.json").read_text())["bias"] == json.loads(bias)["bias"]
        )
    else:
        assert not head.any() and found.keys() == sft.keys() and all(torch.equal(found[key], sft[key]) for key in sft)
        assert not (copied / "ppo" / "critic" / "score_bias.json").exists()


def test_a_run_without_a_critic_has_a_policy_alone_and_less_to_train(recipe: Recipe, copied: Path) -> None:
    ppo_again(recipe, copied, ppo={"advantage_estimator": "rloo", "num_generations": 2, "save_steps": 3})
    assert sorted(path.name for path in (copied / "ppo").iterdir()) == ["checkpoint-3", "policy"]
    assert not (copied / "ppo" / "checkpoint-3" / "critic").exists()
    assert "loss/value_avg" not in ppo_updates(copied)[0] and ppo_updates(copied)[0]["objective/kl"] == 0


def test_texts_give_each_model_a_perplexity(recipe: Recipe, copied: Path, tmp_path: Path) -> None:
    rng = random.Random(2)
    write_rows(tmp_path / "texts.jsonl", [{"text": words(rng, 4 + i % 7)} for i in range(60)])
    changes = {"ptx": {"data": str(tmp_path / "texts.jsonl")}, "ppo": {"ptx_coef": 2.0, "ema_decay": 0.5}}
    summary = ppo_again(recipe, copied, **changes)
    assert {1.0 < model["perplexity"] < 1000 for model in summary["models"].values()} == {True}
    rows = [row for row in rows_of(copied, "ppo") if "eval_perplexity" in row]
    assert rows[-1]["eval_perplexity"] == pytest.approx(summary["models"]["ppo"]["perplexity"])
    assert ppo_updates(copied)[0]["loss/ptx_avg"] > 0
    policy, average = (load_file(copied / "ppo" / role / WEIGHTS) for role in ("policy", "checkpoint-3/ema"))
    assert all(torch.equal(policy[key], average[key]) for key in average)


def test_a_stage_that_max_kl_stops_is_finished_with_its_best_policy(recipe: Recipe, copied: Path) -> None:
    ppo_again(recipe, copied, ppo={"max_kl": 1e-6, "learning_rate": 1e-2})
    assert states(copied)["ppo"] == "done" and [row["step"] for row in ppo_updates(copied)] == [1, 2]
    policy, sft = (load_file(copied / folder / WEIGHTS) for folder in ("ppo/policy", "sft"))
    assert all(torch.equal(policy[key], sft[key]) for key in sft), "the only policy within the limit is the SFT model"


BEST = {"load_best_model_at_end": True, "early_stopping_patience": 2, "eval_steps": 1, "save_steps": 1}


@pytest.fixture(scope="module")
def judged(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A finished run without gold whose judge chose the policy, and stopped PPO early; and its recipe."""
    changes = {"reward": {"judge_share": 0.4}, "dpo": {"data": recipe.reward.data, "heldout": 0.1, "max_steps": 1}}  # type: ignore[union-attr]
    changes["dpo"] |= {"gradient_checkpointing": False, "response_length": 8}
    with_judge = replace(
        recipe, gold=None, **changes, ppo={**BEST, "max_steps": 12, "learning_rate": 1e-2, "max_kl": 1e6}
    )
    folder = tmp_path_factory.mktemp("judged") / "run"
    run(with_judge, folder)
    return with_judge, folder


def test_the_judge_chooses_the_policy_and_ends_the_stage(judged: tuple[Recipe, Path]) -> None:
    _, folder = judged
    results = manifest_of(folder)["stages"]["ppo"]["results"]
    evaluated = {row["step"]: row for row in rows_of(folder, "ppo") if "eval_kl" in row}
    best = max(evaluated, key=lambda step: evaluated[step]["eval_quality"])
    assert all(row["eval_quality"] == row["eval_judge"] != row["eval_score"] for row in evaluated.values())
    assert max(evaluated) == best + 2 < 12, "two evaluations without a better one are the end"
    assert results["best_step"] == best and results["stopped_early"]
    assert results["best_quality"] == evaluated[best]["eval_judge"] != results["models"]["ppo"]["judge"]
    assert sorted(path.name for path in (folder / "ppo").glob("checkpoint-*")) == sorted(
        {f"checkpoint-{best}", f"checkpoint-{best + 2}"}
    )
    for role in ("policy", "critic"):
        saved, chosen = (folder / path / WEIGHTS for path in (f"ppo/{role}", f"ppo/checkpoint-{best}/{role}"))
        assert saved.read_bytes() == chosen.read_bytes()


def test_where_there_is_no_gold_the_judge_says_who_wins(
    judged: tuple[Recipe, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, folder = judged
    for stage in ("ppo", "dpo"):
        samples = comparison(rows_of(folder, stage, "samples.jsonl"))
        ours, theirs = ([s["judge"] for s in samples if s["model"] == model] for model in (stage, "sft"))
        wins = manifest_of(folder)["stages"][stage]["results"]["judge_win_rate_vs_sft"]
        assert wins["rate"] == pytest.approx(
            sum((a > b) + 0.5 * (a == b) for a, b in zip(ours, theirs, strict=True)) / len(ours)
        )
    summary = run(recipe, folder)
    assert summary["judge_score"].keys() == {"base", "sft", "ppo", "dpo"} and summary["win_rate_vs_sft"] is None
    assert 0 <= summary["judge_accuracy"] <= 1
    assert "wins by judge (95 %)" in " ".join(capsys.readouterr().out.replace("┃", " ").split())


@pytest.mark.parametrize("after", [2, None])
def test_a_run_that_chooses_resumes_to_the_same_bytes(
    judged: tuple[Recipe, Path], tmp_path: Path, after: int | None
) -> None:
    """Stopped by a kill `after` a step of PPO, or after its last: in a folder that was moved."""
    recipe, whole = judged
    folder = shutil.copytree(whole, tmp_path / "moved")
    mark_running(folder, "ppo")
    if after is not None:
        recipe = replace(recipe, ppo={"save_total_limit": 20})
        (folder / "recipe.json").unlink()
        shutil.rmtree(folder / "ppo")
        run(recipe, folder, stages=["ppo"])
        mark_running(folder, "ppo")
        for path in (folder / "ppo").glob("checkpoint-*"):
            if checkpoint_step(path.name) > after:
                shutil.rmtree(path)
    shutil.rmtree(folder / "ppo" / "policy")
    run(recipe, folder)
    for role in ("policy", "critic"):
        assert (folder / "ppo" / role / WEIGHTS).read_bytes() == (whole / "ppo" / role / WEIGHTS).read_bytes()
    assert by_stage(reproducible(folder)) == by_stage(reproducible(whole))
    results = [manifest_of(path)["stages"]["ppo"]["results"] for path in (folder, whole)]
    assert results[0] == results[1]


def test_a_policy_that_is_not_finite_is_said(recipe: Recipe, copied: Path) -> None:
    path = copied / "sft" / WEIGHTS
    save_file({name: tensor * float("nan") for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="weights of its base or of an adapter are broken"):
        ppo_again(recipe, copied)


def test_several_rewards_with_weights(recipe: Recipe, copied: Path) -> None:
    sources = {"reward_funcs": ("reward", recipe.gold), "reward_weights": [2.0, 0.25]}
    ppo_again(recipe, copied, ppo=sources)
    first = ppo_updates(copied)[0]
    both = 2.0 * first["rewards/reward_model/mean"] + 0.25 * first["rewards/length/mean"]
    assert first["objective/scores"] == pytest.approx(both, abs=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ppo": {"ptx_coef": 1.0}}, "ppo.ptx_coef mixes in texts and there are none: set ptx.data"),
        ({"ppo": {"reward_weights": [1.0, 2.0]}}, "ppo.reward_weights has 2 weights for 1 rewards: reward"),
        ({"ppo": {"advantage_estimator": "rloo"}}, "^ppo.advantage_estimator=rloo compares responses"),
        ({"ppo": {"reward_funcs": ("nowhere/model",)}}, "'nowhere/model' is not 'reward', no function"),
        ({"ppo": {"critic": "reward", "reward_funcs": ("math:sqrt",)}, "reward": None}, "ppo.critic=reward copies"),
        ({"ppo": {"reward_funcs": ("reward",)}, "reward": None}, "the recipe has no reward stage"),
        ({"ppo": BEST, "gold": None}, "set gold, or reward.judge_share above 0, or ppo.metric_for_best_model"),
        ({"ppo": {**BEST, "eval_strategy": "no"}}, "^ppo.load_best_model_at_end needs evaluations"),
        ({"ppo": {**BEST, "save_steps": 4}}, r"^ppo.load_best_model_at_end .* \(they are 4 and 1\)"),
        ({"ppo": {**BEST, "eval_strategy": "epoch"}}, "^ppo: .*save and eval strategy to match"),
        ({"ppo": {**BEST, "metric_for_best_model": "eval_goold"}}, "no evaluation has 'goold'. Did you mean gold"),
        ({"ppo": {**BEST, "metric_for_best_model": "judge"}}, "no evaluation has 'judge'"),
    ],
)
def test_a_ppo_stage_that_the_recipe_cannot_serve_is_refused(recipe: Recipe, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_recipe(replace(recipe, **changes))


@pytest.mark.skipif(not STORIES.is_dir(), reason="the stories260K model is not beside this checkout")
@pytest.mark.long
def test_a_run_on_conversations(recipe: Recipe, tmp_path: Path) -> None:
    names = ["Tom", "Lily", "Ben", "Sue", "Max", "Mia", "Sam", "Ann"]
    asked = [f"Tell me about {name} and {other}." for name in names for other in names]
    prompts = [[{"role": "user", "content": text}] for text in asked]
    happy, sad = ([{"role": "assistant", "content": f"They were {mood}."}] for mood in ("happy", "sad"))
    write_rows(tmp_path / "sft.jsonl", [{"messages": prompt + happy} for prompt in prompts])
    write_rows(tmp_path / "reward.jsonl", [{"prompt": p, "chosen": happy, "rejected": sad} for p in prompts])
    write_rows(tmp_path / "ppo.jsonl", [{"prompt": prompt} for prompt in prompts])
    few = {"max_steps": 2}
    conversations = replace(
        recipe,
        base={"model": str(STORIES), "chat_template": "transcript"},
        **{stage: {"data": str(tmp_path / f"{stage}.jsonl"), **few} for stage in ("sft", "reward", "ppo")},
        gold=None,
    )
    summary = run(conversations, tmp_path / "run")
    assert summary["gold_score"] == {} and summary["win_rate_vs_sft"] is None
    assert all(isfinite(score) for score in summary["reward_score"].values())
    assert {json.dumps(s["prompt"]) for s in rows_of(tmp_path / "run", "ppo", "samples.jsonl")} <= set(
        map(json.dumps, prompts)
    )
    assert "Human:" in (tmp_path / "run" / "ppo" / "policy" / "chat_template.jinja").read_text()


def test_rows_longer_than_the_models_context_are_dropped(recipe: Recipe, tmp_path: Path) -> None:
    folder = shutil.copytree(recipe.base.model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 12}))
    rng = random.Random(1)
    prompts = [words(rng, 3 + i % 4) for i in range(120)]  # 3, 4, 5 or 6 tokens
    write_rows(tmp_path / "sft.jsonl", [{"prompt": p, "completion": words(rng, 6)} for p in prompts])
    write_rows(tmp_path / "ppo.jsonl", [{"prompt": p} for p in prompts])
    short = replace(
        recipe,
        base={"model": str(folder)},
        sft={"data": str(tmp_path / "sft.jsonl")},
        reward=None,
        ppo={"data": str(tmp_path / "ppo.jsonl"), "reward_funcs": (recipe.gold,)},
    )
    run(frozen(short), tmp_path / "run")
    stages = manifest_of(tmp_path / "run")["stages"]
    # SFT: prompt, 6 words and EOS are 10 to 13 tokens. PPO: the response may take 8 of the 12.
    assert stages["sft"]["data"]["dropped"] == {"too long": 30}
    assert stages["ppo"]["data"]["dropped"] == {"too long": 60}
    assert "13 tokens, limit 12" in stages["sft"]["data"]["examples"][0]


def test_a_base_that_a_function_builds_is_built_once(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_RECIPES_CACHE", str(tmp_path / "cache"))
    builder = tmp_path / "tiny_builder.py"
    builder.write_text(
        "from pathlib import Path\nfrom support.tiny_models import save_model\n\n"
        "def build(folder):\n"
        f"    with Path({str(tmp_path / 'calls')!r}).open('a') as stream:\n        stream.write('x')\n"
        "    save_model(folder)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("tiny_builder:build", f"{builder}:build"):
        built = replace(recipe, base={"model": name})
        run(built, tmp_path / name.replace("/", "-"), stages=["sft"])
        assert Path(model_path(built.base)).parent == tmp_path / "cache"
    assert (tmp_path / "calls").read_text() == "x"
    builder.write_text(builder.read_text() + "\n# A changed builder is another base.\n")
    model_path(Base(f"{builder}:build"))
    assert (tmp_path / "calls").read_text() == "xx"


# --- Measuring --------------------------------------------------------------------------------------------------------


def test_peak_memory_is_measured_anew_for_each_stage() -> None:
    reset_peak_memory()
    before = peak_memory_mib()
    block = b"x" * 2**28
    assert peak_memory_mib() > before + 250
    del block
    reset_peak_memory()
    assert 0 < peak_memory_mib() < before + 50
