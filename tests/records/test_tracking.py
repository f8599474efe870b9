"""What trackers are told of a run: wandb offline, trackio and TensorBoard, each read back from its files."""

import importlib.util
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from support.run_folder import mark_running, rows_of, states
from support.worded import make_recipe
from transformers import TrainerCallback

from rlhf_recipes import Recipe, replace, run
from rlhf_recipes.records import tracking
from rlhf_recipes.records.tracking import (
    Session,
    TensorBoardTracker,
    _cell,
    grouped,
    result_numbers,
    tracked_run,
    wandb_mode,
)

STAGES = ("sft", "reward", "ppo")


def words(completions: list[str], **columns: Any) -> list[float]:
    """The gold of these tests."""
    return [float(len(text.split())) for text in completions]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    recipe = make_recipe(tmp_path_factory.mktemp("tracking"))
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "heldout_limit": 3}
    short = {"max_steps": 2, "logging_steps": 1}
    return replace(recipe, rounds=None, gold=f"{__file__}:words", sft=short, reward=short, ppo=evaluated)


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings, no key and no cache of the user's."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))


# --- Names ------------------------------------------------------------------------------------------------------------


def test_every_metric_has_a_group_before_its_first_slash() -> None:
    named = {
        "loss": "train/loss",
        "learning_rate": "train/learning_rate",
        "response_length": "train/response_length",
        "objective/kl": "objective/kl",
        "rewards/is_short/mean": "rewards/is_short/mean",
        "eval_gold": "eval/gold",
        "eval_rewards/accuracies": "eval/rewards/accuracies",
    }
    assert {name: grouped(name) for name in named} == named


def test_a_summary_is_the_numbers_of_the_results() -> None:
    found = {
        "heldout_loss": 1.5,
        "models": {"ppo": {"gold": 2.0}},
        "card": {"swap_error": 0.0},
        "members_accuracy": [0.5],
    }
    assert result_numbers(found) == {"results/heldout_loss": 1.5, "results/models/ppo/gold": 2.0}


def test_a_cell_of_text_shows_a_models_words_as_they_are() -> None:
    assert _cell("<b>a</b> | [x](y)\n*z*") == ("&#60;b&#62;a&#60;&#47;b&#62; &#124; &#91;x&#93;&#40;y&#41; &#42;z&#42;")
    assert _cell(0.123456) == "0.1235" and _cell(True) == "True"


# --- Weights & Biases -------------------------------------------------------------------------------------------------


def wandb_records(content: bytes) -> list[Any]:
    """The records in so much of an offline run's .wandb file as is written; wandb has no public reader for it.

    After 7 bytes of its own it is a LevelDB log: blocks of 32 KiB with chunks of checksum (4 bytes), length (2, little
    endian), type (1: whole, 2: first, 3: middle, 4: last) and payload; a record is one wandb.proto `Record`.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    at, record, records = 7, b"", []
    assert content[:4] in (b":W&B", b"")
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:  # no header fits in the rest of a block
            at += 2**15 - at % 2**15
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        if at + 7 + length > len(content):
            break
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            records.append(Record.FromString(record))
            record = b""
    return records


def whole_run(path: Path) -> list[Any]:
    """An offline run's records up to its end: wandb's own process still writes them when `finish` has returned."""
    for _ in range(600):
        records = wandb_records(path.read_bytes())
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.1)
    pytest.fail(f"{path} has no end after a minute")


def wandb_runs(folder: Path) -> dict[str, list[tuple[Any, list[Any], Path]]]:
    """The offline runs below a run folder by job, in the order of their start: head, records and folder of each."""
    runs = []
    for path in folder.glob("wandb/offline-run-*/*.wandb"):
        records = whole_run(path)
        runs.append((next(record.run for record in records if record.HasField("run")), records, path.parent))
    found: dict[str, list[tuple[Any, list[Any], Path]]] = {}
    for one in sorted(runs, key=lambda one: one[0].start_time.ToNanoseconds()):
        found.setdefault(one[0].job_type, []).append(one)
    return found


def history(records: list[Any]) -> list[dict[str, Any]]:
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]


def configured(head: Any, records: list[Any]) -> dict[str, Any]:
    updates = [head.config, *(record.config for record in records if record.HasField("config"))]
    return {item.key: json.loads(item.value_json) for update in updates for item in update.update}


def summarized(records: list[Any]) -> dict[str, Any]:
    return {
        "/".join(item.nested_key) or item.key: json.loads(item.value_json)
        for record in records
        if record.HasField("summary")
        for item in record.summary.update
    }


@pytest.mark.parametrize(("netrc", "mode"), [("login a password b", 0o644), ("machine", 0o600), ("\udcff", 0o600)])
def test_a_netrc_that_cannot_be_used_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, netrc: str, mode: int
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    words = netrc if netrc == "machine" else f"machine api.wandb.ai {netrc}"
    (tmp_path / ".netrc").write_bytes(words.encode(errors="surrogateescape"))
    (tmp_path / ".netrc").chmod(mode)
    assert wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "http://[")
    assert wandb_mode() == "offline", "W&B itself says what is wrong with it, where it is asked"


def test_wandb_without_a_key_is_offline_and_complete(recipe: Recipe, tmp_path: Path, environment: None) -> None:
    folder = tmp_path / "tracked"
    summary = run(replace(recipe, tracker="wandb", artifacts=True), folder)
    jobs = {name: runs[0] for name, runs in wandb_runs(folder).items()}
    assert jobs.keys() == {*STAGES, "report"}, "no key, and nobody was asked for one"
    for name, (head, records, _) in jobs.items():
        assert (head.run_group, head.display_name, head.project) == ("tracked", f"tracked-{name}", "rlhf-recipes")
        assert configured(head, records)["recipe"]["ppo"]["args"]["response_length"] == 8
    head, records, files = jobs["ppo"]
    assert configured(head, records)["base"]["dtype"] == "float32"
    assert configured(head, records)["args"]["max_steps"] == -1 and configured(head, records)["round"] == 1

    points = history(records)
    updates = [row for row in rows_of(folder, "ppo") if "objective/kl" in row]
    kl = [(row["train/global_step"], row["objective/kl"]) for row in points if "objective/kl" in row]
    assert kl == [(row["step"], row["objective/kl"]) for row in updates]
    gold = [row["eval_gold"] for row in rows_of(folder, "ppo") if "eval_gold" in row]
    assert gold and gold == [row["eval/gold"] for row in points if "eval/gold" in row]
    groups = {name.partition("/")[0] for row in points for name in row if not name.startswith("_")}
    assert groups == {
        "completions",
        "eval",
        "loss",
        "memory",
        "objective",
        "policy",
        "critic",
        "rewards",
        "time",
        "train",
        "val",
    }

    found = summarized(records)
    assert found["results/models/ppo/gold"] == summary["models"]["ppo"]["gold"]
    assert found["results/win_rate_vs_sft/rate"] == summary["win_rate_vs_sft"]["rate"]
    assert found["results/seconds"] > 0 and found["results/peak_memory_mib"] > 0
    assert summarized(jobs["reward"][1])["results/heldout_accuracy"] == summary["reward_model_accuracy"]

    tables = [json.loads(path.read_text()) for path in files.glob("files/media/table/completions*.table.json")]
    assert sum(len(table["data"]) for table in tables) == len(rows_of(folder, "ppo", "samples.jsonl"))
    assert {"model", "prompt", "completion", "score", "gold"} <= set(tables[0]["columns"])


def artifacts(records: list[Any]) -> dict[str, Any]:
    found = [record.request.log_artifact.artifact for record in records if record.request.HasField("log_artifact")]
    found += [record.artifact for record in records if record.HasField("artifact")]
    return {artifact.name: artifact for artifact in found}


def test_artifacts_are_the_adapters_and_the_report(recipe: Recipe, tmp_path: Path, environment: None) -> None:
    folder = tmp_path / "kept"
    run(replace(recipe, tracker="wandb", artifacts=True), folder)
    kept = {name: artifacts(runs[0][1]) for name, runs in wandb_runs(folder).items()}
    kinds = {
        name: artifact.type
        for of_job in kept.values()
        for name, artifact in of_job.items()
        if artifact.type != "run_table"
    }
    adapters = {"kept-sft", "kept-reward", "kept-ppo-policy", "kept-ppo-critic"}
    assert kinds == {**dict.fromkeys(adapters, "model"), "kept-report": "report"}
    contents = {entry.path for entry in kept["ppo"]["kept-ppo-policy"].manifest.contents}
    assert {"adapter_config.json", "adapter_model.safetensors", "base.json"} <= contents
    assert json.loads(kept["reward"]["kept-reward"].metadata)["stage"] == "reward"
    assert {"recipe.json", "summary.json"} <= {entry.path for entry in kept["report"]["kept-report"].manifest.contents}


def test_a_resumed_stage_goes_on_in_its_run(recipe: Recipe, tmp_path: Path, environment: None) -> None:
    folder = tmp_path / "resumed"
    tracked = replace(recipe, tracker="wandb")
    run(tracked, folder)
    mark_running(folder, "ppo")
    shutil.rmtree(folder / "ppo" / "checkpoint-2")
    run(tracked, folder)
    (first, *_), (second, records, _) = wandb_runs(folder)["ppo"]
    assert first.run_id == second.run_id and len(wandb_runs(folder)["sft"]) == 1
    assert {row["train/global_step"] for row in history(records) if "objective/kl" in row} == {2}


def test_each_adapter_of_an_ensemble_has_a_run(recipe: Recipe, tmp_path: Path, environment: None) -> None:
    folder = tmp_path / "several"
    run(replace(recipe, tracker="wandb", reward={"ensemble_size": 2}), folder, ["sft", "reward"])
    jobs = wandb_runs(folder)
    assert jobs.keys() == {"sft", "reward", "reward-1"}
    for stage in ("reward", "reward-1"):
        losses = [row["train/loss"] for row in history(jobs[stage][0][1]) if "train/loss" in row]
        assert losses == [row["loss"] for row in rows_of(folder, stage) if "loss" in row]
    # The stage's own run is not ended by the other's.
    assert "results/heldout_accuracy" in summarized(jobs["reward"][0][1])


# --- trackio and TensorBoard ------------------------------------------------------------------------------------------


def test_trackio_keeps_curves_tables_and_results(
    recipe: Recipe, tmp_path: Path, environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trackio import utils
    from trackio.sqlite_storage import SQLiteStorage

    for place in ("TRACKIO_DIR", "MEDIA_DIR"):  # read from the environment at its import
        monkeypatch.setattr(utils, place, tmp_path / "trackio" / place, raising=False)
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio", raising=False)
    folder = tmp_path / "local"
    summary = run(replace(recipe, tracker="trackio"), folder)
    logs = SQLiteStorage.get_logs("rlhf-recipes", "local-ppo")
    updates = [row for row in rows_of(folder, "ppo") if "objective/kl" in row]
    kl = [(row["step"], row["objective/kl"]) for row in logs if "objective/kl" in row]
    assert kl == [(row["step"], pytest.approx(row["objective/kl"])) for row in updates]
    (gold,) = [row["results/models/ppo/gold"] for row in logs if "results/models/ppo/gold" in row]
    assert gold == pytest.approx(summary["models"]["ppo"]["gold"])
    assert any("completions" in row for row in logs)


def test_tensorboard_keeps_curves_tables_and_results(recipe: Recipe, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "events"
    summary = run(replace(recipe, tracker="tensorboard"), folder)
    for stage in STAGES:
        events = EventAccumulator(str(folder / "tensorboard" / stage))
        events.Reload()
        tags = events.Tags()
        losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
        wanted = [(row["step"], row["loss"]) for row in rows_of(folder, stage) if "loss" in row]
        assert losses == [(step, pytest.approx(value)) for step, value in wanted]
        assert "config/text_summary" in tags["tensors"]
    (gold,) = events.Scalars("results/models/ppo/gold")
    assert gold.value == pytest.approx(summary["models"]["ppo"]["gold"])
    assert "completions/text_summary" in tags["tensors"]


def test_a_resumed_stage_shows_no_point_twice_in_tensorboard(recipe: Recipe, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, tracked = tmp_path / "events", replace(recipe, tracker="tensorboard")
    run(tracked, folder)
    mark_running(folder, "ppo")
    shutil.rmtree(folder / "ppo" / "checkpoint-2")
    run(tracked, folder)
    events = EventAccumulator(str(folder / "tensorboard" / "ppo"))
    events.Reload()
    assert [event.step for event in events.Scalars("objective/kl")] == [1, 2]


# --- Trackers that fail, or are slow ----------------------------------------------------------------------------------


def session_of(folder: Path) -> Session:
    return Session(folder, folder.name, "sft", f"{folder.name}-sft", {"recipe": {}}, secrets.token_hex(4))


def log_ten(tracker: str, folder: Path) -> float:
    """Log ten points as a stage does. Returns the seconds that its training has waited for them."""
    with tracked_run(tracker, session_of(folder)) as run:
        start = time.perf_counter()
        for step in range(1, 11):
            run.point({"loss": float(step)}, step)
        run.table("completions", [{"model": "base"}], 10)
        run.summarize({"results/gold": 1.0})
        return time.perf_counter() - start


def logged(folder: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard" / "sft"))
    events.Reload()
    return [event.value for event in events.Scalars("train/loss")]


@pytest.mark.parametrize("method", ["__init__", "log", "table", "summarize", "finish"])
def test_a_tracker_that_fails_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("the server\nis away")

    monkeypatch.setattr(TensorBoardTracker, method, fail)
    log_ten("tensorboard", tmp_path)
    (said,) = capsys.readouterr().err.splitlines()
    assert f"tracker of sft, whose rows are in {tmp_path}/metrics.jsonl," in said
    assert "(ConnectionError: the server is away). The run goes on without it." in said


def test_a_stage_is_trained_whose_tracker_fails(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def fail(*args: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(SummaryWriter, "add_scalar", fail)
    run(replace(recipe, tracker="tensorboard"), tmp_path / "run", ["sft"])
    assert states(tmp_path / "run") == {"sft": "done"} and rows_of(tmp_path / "run", "sft")
    assert capsys.readouterr().err.count("no route to host") == 1


def test_training_does_not_wait_for_a_slow_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = TensorBoardTracker.log

    def slow(self: Any, *args: Any) -> None:
        time.sleep(0.05)
        log(self, *args)

    monkeypatch.setattr(TensorBoardTracker, "log", slow)
    assert log_ten("tensorboard", tmp_path) < 0.3
    assert logged(tmp_path) == [float(step) for step in range(1, 11)]


@pytest.mark.parametrize(
    ("constant", "few", "why"),
    [("PATIENCE", 0.1, "is still busy after 0 seconds"), ("WAITING", 5, "is too slow (5 calls wait)")],
)
def test_a_tracker_that_hangs_is_left_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    constant: str,
    few: float,
    why: str,
) -> None:
    returns = threading.Event()
    monkeypatch.setattr(TensorBoardTracker, "log", lambda *args: returns.wait())
    monkeypatch.setattr(tracking, "PATIENCE", 0.1)
    monkeypatch.setattr(tracking, constant, few)
    log_ten("tensorboard", tmp_path)
    returns.set()
    (said,) = capsys.readouterr().err.splitlines()
    assert why in said


@pytest.fixture
def unread(environment: None) -> Iterator[None]:
    """wandb reads its environment again, as it does once a process."""
    wandb.teardown()
    yield
    wandb.teardown()


def test_wandb_that_cannot_be_reached_is_offline_from_then_on(
    tmp_path: Path, unread: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    away = {"MODE": "online", "BASE_URL": "http://127.0.0.1:9", "API_KEY": "a" * 40, "INIT_TIMEOUT": "1"}
    for name, value in away.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    log_ten("wandb", tmp_path)
    (said,) = capsys.readouterr().err.splitlines()
    assert "W&B cannot be reached (CommError: " in said
    assert f"`wandb sync {tmp_path}/wandb/offline-run-*` sends it later" in said
    ((_, records, _),) = wandb_runs(tmp_path)["sft"]
    assert [row["train/loss"] for row in history(records) if "train/loss" in row] == [*map(float, range(1, 11))]
    assert os.environ["WANDB_MODE"] == "offline"


def test_wandb_online_without_a_key_is_refused(tmp_path: Path, unread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ValueError, match="tracker=wandb: No API key configured"):
        log_ten("wandb", tmp_path)


def test_an_artifact_that_wandb_does_not_take_is_said(
    tmp_path: Path, environment: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with tracked_run("wandb", session_of(tmp_path)) as run:
        run.upload("name", "model", [tmp_path / "gone"], {})
    (said,) = capsys.readouterr().err.splitlines()
    assert "has failed (ValueError: Path is not a file" in said


# --- What cannot be, and callbacks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tracker", ["none", "tensorboard"])
def test_artifacts_need_a_tracker_that_keeps_files(recipe: Recipe, tmp_path: Path, tracker: Any) -> None:
    with pytest.raises(ValueError, match="artifacts needs a tracker that keeps files, wandb or trackio"):
        run(replace(recipe, tracker=tracker, artifacts=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed_is_refused_before_anything_runs(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"tracker=trackio needs a package: pip install 'rlhf_recipes\[trackers\]'"):
        run(replace(recipe, tracker="trackio"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Steps(TrainerCallback):
    """Notes which stages it sees, and stops PPO after its first update."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stage = Path(args.output_dir).name
        self.seen.append((stage, state.global_step))
        control.should_training_stop = control.should_training_stop or stage == "ppo"


def test_a_users_callback_sees_every_stage_and_may_stop_one(recipe: Recipe, tmp_path: Path) -> None:
    steps = Steps()
    run(recipe, tmp_path / "run", callbacks=[steps])
    assert steps.seen == [("sft", 1), ("sft", 2), ("reward", 1), ("reward", 2), ("ppo", 1)]
