"""What a stage says of its progress."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from rlhf_recipes.records.checkpoints import SEAL, seal
from rlhf_recipes.records.progress import Later
from rlhf_recipes.stages import callbacks, shares
from rlhf_recipes.stages.callbacks import LogWithCheckpoints, ShowProgress
from rlhf_recipes.stages.shares import WritesOnce


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


@pytest.mark.parametrize(
    ("strategy", "saves", "evaluates", "logs", "expected"),
    [
        ("steps", True, False, False, True),
        ("steps", False, True, False, False),
        ("steps", False, False, True, True),
        ("best", False, True, False, True),
        ("best", False, False, False, False),
    ],
)
def test_each_checkpoint_has_a_row(strategy: str, saves: bool, evaluates: bool, logs: bool, expected: bool) -> None:
    control = SimpleNamespace(should_save=saves, should_evaluate=evaluates, should_log=logs)
    LogWithCheckpoints().on_step_end(SimpleNamespace(save_strategy=strategy), None, control)
    assert control.should_log == expected


class Line(nn.Module):
    """A line through nothing: its slope is to be learned."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.slope * x - labels).square().mean(), "found": self.slope * x}


def make_trainer(kind: type[Trainer], folder: Path, callbacks: list[TrainerCallback], **args: Any) -> Trainer:
    """What learns that line, from the same start each time."""
    config = TrainingArguments(str(folder), **args, use_cpu=True, report_to=[], disable_tqdm=True)
    data = [{"x": torch.tensor([float(n)]), "labels": torch.tensor([2.0 * n])} for n in range(16)]
    torch.manual_seed(0)
    return kind(Line(), config, train_dataset=data, eval_dataset=data, callbacks=callbacks)


@pytest.mark.parametrize(("limit", "kept"), [(1, [5]), (2, [4, 5]), (None, [1, 2, 3, 4, 5])])
def test_older_checkpoints_are_deleted_by_their_steps_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None, kept: list[int]
) -> None:
    sealed: list[list[str]] = []  # which others were there when each new one was put on disk

    class SetBack(TrainerCallback):
        """The clock was an hour ahead while the first checkpoint was written."""

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                os.utime(tmp_path / "checkpoint-1", (time.time() + 3600,) * 2)

    def noted(checkpoint: Path) -> None:
        sealed.append(sorted(path.name for path in tmp_path.glob("checkpoint-*") if path != checkpoint))
        seal(checkpoint)

    monkeypatch.setattr(shares, "seal", noted)
    trainer = make_trainer(WritesOnce, tmp_path, [SetBack()], max_steps=5, save_steps=1, save_total_limit=limit)
    trainer.train()
    assert sorted(tmp_path.glob("checkpoint-*")) == [tmp_path / f"checkpoint-{step}" for step in kept]
    assert all((tmp_path / f"checkpoint-{step}" / SEAL).is_file() for step in kept)
    assert sealed[1] == ["checkpoint-1"], "the older one is deleted once the new one is on disk"
    assert trainer.args.save_total_limit == limit


def test_the_best_checkpoint_keeps_the_loss_up_to_it(tmp_path: Path) -> None:
    """Of a run that is killed behind it, and begins again there, no step's loss is lost."""

    class Rows(TrainerCallback):
        def __init__(self) -> None:
            self.losses: list[tuple[int, float]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                self.losses.append((state.global_step, logs["loss"]))

    def trainer(folder: Path, rows: Rows) -> Trainer:
        args = {"max_steps": 5, "logging_steps": 5, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best"}
        return make_trainer(Trainer, folder, [LogWithCheckpoints(), rows], **args, metric_for_best_model="loss")

    whole, resumed = Rows(), Rows()
    trainer(tmp_path, whole).train()
    again = trainer(tmp_path, resumed)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [step for step, _ in whole.losses] == [2, 4, 5]
    assert resumed.losses == whole.losses[1:]
