"""The manifest of a run folder: what it says of stages, and that its file stays as older versions wrote it."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.records.manifest import VERSIONS, Manifest, _without_memory

DATA: Any = {"source": "rows.jsonl", "rows": 3, "used": 3, "train": 2, "heldout": 1}
SFT = {"seconds": 8.4, "peak_memory_mib": 810.6, "state": "done", "data": DATA, "results": {"heldout_loss": 0.5}}
OLD = {"stages": {"sft": SFT}, "versions": {"rlhf_recipes": "0.1.0"}, "base": {"model": "sha256:d43643d2a02b8fb3"}}


def test_a_manifest_of_an_older_version_is_read_and_written_in_the_same_form(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(OLD))
    manifest = Manifest.read(tmp_path)
    assert manifest.is_done("sft") and manifest.results("sft") == {"heldout_loss": 0.5}
    assert manifest.versions == {"rlhf_recipes": "0.1.0"}, "what a run was made with, until it goes on"
    manifest.write(tmp_path)
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert written.pop("versions").keys() == {"python", "rlhf_recipes", *VERSIONS} and written.items() <= OLD.items()


def test_a_stage_that_has_begun_is_not_done_and_keeps_its_time(tmp_path: Path) -> None:
    manifest = Manifest.read(tmp_path)
    assert manifest == Manifest() and not manifest.is_done("sft") and manifest.results("sft") == {}
    record = manifest.begin("sft", DATA)
    assert not manifest.is_done("sft") and (record["seconds"], record["peak_memory_mib"]) == (0.0, 0.0)
    record["seconds"] = 2.5
    again = manifest.begin("sft", {**DATA, "rows": 4})
    assert again is manifest.stages["sft"] and (again["seconds"], again["data"]["rows"]) == (2.5, 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"other": 1},
        {"stages": []},
        {"stages": {"sft": None}},
        {"stages": {"sft": {**SFT, "state": 3}}},
        {"stages": {"sft": {**SFT, "seconds": "x"}}},
        {"stages": {"sft": {**SFT, "results": [1]}}},
    ],
)
def test_a_manifest_of_another_form_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(OLD | changes))
    with pytest.raises(ValueError, match=r"manifest\.json is not what this package writes\. Delete it, and run all"):
        Manifest.read(tmp_path)


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: not JSON"):
        Manifest.read(tmp_path)


def test_both_of_our_ways_to_sample_give_the_same_run() -> None:
    unset, eager, other = (
        _without_memory({"ppo": {"args": args}})
        for args in (
            {},
            {"generation_backend": "eager", "rollout_micro_batch_size": 8},
            {"generation_backend": "generate"},
        )
    )
    assert unset == eager != other


def test_where_a_base_lies_does_not_change_a_run() -> None:
    bases = ({"model": "a"}, {"model": "a", "split": "layers"}, {"model": "b"})
    before, split, other = (_without_memory({"base": base}) for base in bases)
    assert before == split != other
