"""A stage between the two writes of the manifest."""

import json
import os
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

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
