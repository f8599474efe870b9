"""What a stage says of its progress."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerState

from rlhf_recipes.records.progress import Later
from rlhf_recipes.stages import callbacks
from rlhf_recipes.stages.callbacks import LogWithCheckpoints, ShowProgress


@pytest.mark.parametrize("writes", [True, False])
def test_the_bar_and_the_folder_say_what_is_left_of_the_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], writes: bool
) -> None:
    clock, unused = SimpleNamespace(monotonic=lambda: 1000.0), (None, None)
    monkeypatch.setattr(callbacks, "time", clock)
    later = [Later("ppo", (600.0, 600.0)), Later("dpo", None)]
    shown = ShowProgress("reward-1", 2, later, tmp_path, writes)
    state = TrainerState(max_steps=100, global_step=40)  # it goes on from a checkpoint

    def log(step: int, now: float) -> Any:
        state.global_step, clock.monotonic = step, lambda: now
        shown.on_log(*unused[:1], state, None, logs={"loss": 0.5})
        file = tmp_path / "progress.json"
        return json.loads(file.read_text()) if file.is_file() else None

    shown.on_train_begin(None, state, None)
    first = log(40, 1000.0)
    # Ten steps took 100 s: the other fifty take 500 s, and the stage after it 600 s, as it did before.
    found = log(50, 1100.0)
    moment = log(51, 1101.0)
    shown.on_train_end(None, state, None)
    assert "loss=0.5, run=about 18 min left, then dpo" in capsys.readouterr().err
    if not writes:
        assert found is None
        return
    assert first | {"step": 50, "seconds": [1100.0, 1100.0]} == found and first["seconds"] is None
    assert found | {"then": 0} == {
        **{"stage": "reward-1", "round": 2, "step": 50, "steps": 100, "seconds": [1100.0, 1100.0], "then": 0}
    }
    assert found["then"] == ["dpo"] and moment == found, "it is not written at every step"


def test_each_checkpoint_has_a_row() -> None:
    for saves, logs in ((True, False), (False, True), (False, False)):
        control = SimpleNamespace(should_save=saves, should_log=logs)
        LogWithCheckpoints().on_step_end(None, None, control)
        assert control.should_log == (saves or logs)
