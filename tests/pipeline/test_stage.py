"""A stage between the two writes of the manifest."""

import dataclasses
import json
import os
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.worded import make_recipe, weights
from transformers import TrainerCallback

from rlhf_recipes import Base, DPOStage, Recipe, load, replace, run
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

    config = SimpleNamespace(chosen_sizes={})
    job: Any = SimpleNamespace(stage="sft", run_dir=tmp_path, folder=tmp_path / "sft", config=config, tracked=tracked)
    job.data, job.recipe = SimpleNamespace(report={}), SimpleNamespace(seed=0, base=Base("any"))
    job.conclude = lambda results: None
    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setitem(stage.TRAIN, "sft", trains)
    stage.run_stage(job, Manifest(), None)
    assert synced[0] == "running"
    before = set(synced[: synced.index("done")])
    assert {"adapter_model.safetensors", "trainer_state.json", "checkpoint-1", "sft", "metrics.jsonl"} <= before


def with_dpo(recipe: Recipe, **args: Any) -> Recipe:
    """The recipe with a stage more, on the rows of pairs that `make_recipe` has written."""
    assert recipe.sft is not None
    data, args = str(Path(recipe.sft.data).with_name("pairs.jsonl")), {**recipe.sft.args, **args}
    return dataclasses.replace(recipe, dpo=DPOStage(data, heldout=0.1, args={**args, "response_length": 4}))


class RunsOut(TrainerCallback):
    """As if memory ran out in the third step of a stage that trains more than two rows at once."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []  # rows at once, and the step that begins

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append((args.per_device_train_batch_size, state.global_step))
        if args.per_device_train_batch_size > 2 and state.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_where_memory_runs_out_a_stage_goes_on_with_half_of_the_rows_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"gradient_accumulation_steps": 1, "max_steps": 4, "save_steps": 1}
    recipe = with_dpo(replace(make_recipe(tmp_path), rounds=None, ppo=None, sft=sizes, reward=sizes), **sizes)
    watching = RunsOut()
    run(recipe, tmp_path / "run", callbacks=[watching])
    of_sft = [(8, 0), (8, 1), (8, 2), (4, 2), (2, 2), (2, 3)]  # from the checkpoint behind the second step
    assert watching.seen == of_sft * 3
    assert "sft ran out of memory with 8 rows at once; it goes on with sft.per_device_train_batch_size=4" in caplog.text
    stages = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]
    chosen = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert [stages[name]["chosen_sizes"] for name in ("sft", "reward", "dpo")] == [chosen] * 3

    run(recipe, tmp_path / "whole")
    for name in ("sft", "reward", "dpo"):
        ours, whole = weights(tmp_path / "run" / name), weights(tmp_path / "whole" / name)
        for key in whole:
            torch.testing.assert_close(ours[key], whole[key], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("rows", "fewer"), [(6, [3, 1]), (5, [1]), (9, [3, 1]), (1, [])])
def test_rows_that_are_no_power_of_two_go_down_to_one(rows: int, fewer: list[int]) -> None:
    config = SimpleNamespace(per_device_train_batch_size=rows, gradient_accumulation_steps=2)
    found = []
    while sizes := stage.smaller_sizes(config, evaluates=False):
        vars(config).update(sizes)
        found.append(config.per_device_train_batch_size)
        assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 2 * rows
    assert found == fewer


class RunsOutInEvaluation(TrainerCallback):
    """As if memory ran out where more rows than there is room for are evaluated at once."""

    def __init__(self, room: int) -> None:
        self.room, self.seen = room, set[tuple[int, int]]()  # rows at once, in training and in evaluation

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.add((args.per_device_train_batch_size, args.per_device_eval_batch_size))
        if args.per_device_eval_batch_size > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_where_memory_runs_out_in_evaluation_it_takes_fewer_rows_and_training_as_many(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"max_steps": 1, "per_device_eval_batch_size": 4}
    recipe = with_dpo(replace(make_recipe(tmp_path), rounds=None, ppo=None, reward=None, sft=sizes), **sizes)
    watching = RunsOutInEvaluation(room=3)
    run(recipe, tmp_path / "run", callbacks=[watching])
    assert watching.seen == {(8, 4), (8, 2)}
    said = "{}'s evaluation ran out of memory with 4 rows at once; it goes on with {}.per_device_eval_batch_size=2."
    stages = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]
    for name in ("sft", "dpo"):
        assert said.format(name, name) in caplog.text
        assert stages[name]["chosen_sizes"] == {"per_device_eval_batch_size": 2}
    with pytest.raises(ValueError, match=r"sft ran out of memory while evaluating: 2.00 GiB"):
        run(replace(recipe, dpo=None), tmp_path / "none", callbacks=[RunsOutInEvaluation(room=0)])


def test_auto_takes_a_whole_step_at_once_where_it_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"gradient_accumulation_steps": "auto", "max_steps": 4, "save_steps": 1}
    recipe = replace(make_recipe(tmp_path), rounds=None, ppo=None, reward=None, sft=sizes)
    watching = RunsOut()
    run(recipe, tmp_path / "run", callbacks=[watching])
    assert watching.seen == [(8, 0), (8, 1), (8, 2), (4, 2), (2, 2), (2, 3)]
    chosen = "chosen: per_device_train_batch_size=8, gradient_accumulation_steps=1"
    assert chosen in " ".join(capsys.readouterr().out.split())
    again = RunsOut()
    same = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    run(replace(recipe, sft=same), tmp_path / "run", callbacks=[again])
    assert again.seen == [], "it is the same run, and finished"


def test_where_not_even_one_row_fits_the_stage_says_what_helps(tmp_path: Path) -> None:
    class Never(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    recipe = replace(make_recipe(tmp_path), rounds=None, ppo=None, reward=None)
    with pytest.raises(ValueError, match=r"sft ran out of memory: 2.00 GiB were asked for, .* resumes"):
        run(recipe, tmp_path / "run", callbacks=[Never()])


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
