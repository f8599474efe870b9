"""A stage between the two writes of the manifest."""

import dataclasses
import json
import os
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_recipes import load, replace
from rlhf_recipes.pipeline import stage
from rlhf_recipes.records.manifest import Manifest


def test_a_stage_is_done_once_all_that_it_wrote_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The power may fail at any time: a manifest that says `done` of an empty adapter would be believed for ever."""
    synced: list[str] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        is_manifest = path.name.startswith("manifest.json.")
        synced.append(json.loads(path.read_text())["stages"]["sft"]["state"] if is_manifest else path.name)
        fsync(descriptor)

    def trains(job: Any) -> dict[str, Any]:
        (job.folder / "checkpoint-1").mkdir()
        for name in ("adapter_model.safetensors", "checkpoint-1/trainer_state.json", "../metrics.jsonl"):
            (job.folder / name).write_text("{}")
        return {}

    @contextmanager
    def tracked() -> Any:
        yield job

    job: Any = SimpleNamespace(stage="sft", run_dir=tmp_path, folder=tmp_path / "sft", config=None, tracked=tracked)
    job.data, job.recipe = SimpleNamespace(report={}), SimpleNamespace(seed=0)
    job.conclude = lambda results: None
    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setitem(stage.TRAIN, "sft", trains)
    stage.run_stage(job, Manifest(), None)
    assert synced[0] == "running"
    before = set(synced[: synced.index("done")])
    assert {"adapter_model.safetensors", "trainer_state.json", "checkpoint-1", "sft", "metrics.jsonl"} <= before


def test_what_follows_takes_as_long_as_it_did_in_the_round_before(tmp_path: Path) -> None:
    data: Any = {}
    for folder, seconds in ((tmp_path, 60.0), (tmp_path / "round-2", 80.0)):
        manifest = Manifest()
        for name in ("reward", "ppo"):
            manifest.begin(name, data).update(state="done", seconds=seconds)
        folder.mkdir(exist_ok=True)
        manifest.write(folder)
    recipe = replace(load("tiny"), rounds={"count": 4, "labeler": "rlhf_recipes.worlds.tiny:labeler"})
    agenda = tuple((name, number) for number in (2, 3, 4) for name in ("reward", "ppo"))
    nothing: Any = None
    run = stage.ActiveRun(recipe, tmp_path, {}, nothing, nothing, True, (), nothing, agenda, {"ppo": (1.0, 2.0)})
    assert run.later("ppo", 2)[0] == ("reward of round 3", (80.0, 80.0)) and len(run.later("ppo", 2)) == 4
    assert run.later("reward", 2)[0] == ("ppo of round 2", (60.0, 60.0)), "of the round before, not of its own"
    first = dataclasses.replace(run, agenda=(("sft", 1), ("reward", 1), ("ppo", 1)))
    assert first.later("sft", 1) == (("reward", None), ("ppo", (1.0, 2.0))), "by the plan, where that knows the card"
    people = dataclasses.replace(run, recipe=replace(recipe, rounds={"labeler": "people"}))
    assert people.later("reward", 2) == (("ppo of round 2", (60.0, 60.0)),), "then the run waits for people"
    assert people.later("ppo", 4) == run.later("ppo", 4) == ()
