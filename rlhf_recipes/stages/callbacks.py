"""What watches a stage's trainer: the recorder of its logs, and the bar on the terminal."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..records.files import write_json
from ..records.progress import PROGRESS, Later, Progress, left_words, seconds_left
from ..records.recorder import Recorder

WRITE_EVERY = 5.0  # seconds: a write that a power cut leaves whole takes some milliseconds


class RecordLogs(TrainerCallback):
    """Hands each logged row to the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.recorder.metrics(state.global_step, logs)


class LogWithCheckpoints(TrainerCallback):
    """Logs a row with each checkpoint: what is summed since the last one is lost to a run that goes on from there."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Which evaluation is the best one, and saved, is known only behind the row.
        may_save = control.should_save or (control.should_evaluate and args.save_strategy == "best")
        control.should_log = control.should_log or may_save

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step_end(args, state, control)


class StartOnce(TrainerCallback):
    """`eval_on_start` is for training's start: from a checkpoint on, it would evaluate one step a second time."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        args.eval_on_start = args.eval_on_start and not state.global_step


class ShowProgress(TrainerCallback):
    """A progress bar over the stage's steps with the numbers that matter in it, and one over each evaluation.

    In it, and in the run's `progress.json`, stands how long the whole run still takes, as far as that is known.
    """

    SHOWN: ClassVar = {
        "loss": "loss",
        "accuracy": "accuracy",
        "rewards/accuracies": "accuracy",
        "objective/scores": "reward",
        "objective/kl": "KL",
        "response_length": "tokens",
        "eval_gold": "gold",
        "eval_judge": "judge",
    }

    def __init__(self, stage: str, round_number: int, later: Sequence[Later], run_dir: Path, writes: bool) -> None:
        """
        Args:
            later: what the run does after it.
            run_dir: the run's own folder.
            writes: False in a process for which another one writes.
        """
        self.stage, self.round, self.later = stage, round_number, later
        self.file = run_dir / PROGRESS if writes else None
        self.started = self.written = 0.0  # on the monotonic clock
        self.first_step = 0
        self.shown: dict[str, str] = {}
        self.bar: tqdm | None = None  # while training goes on
        self.evaluation: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.first_step = time.monotonic(), state.global_step
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.stage, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if self.evaluation is None:
            batches = len(eval_dataloader)
            self.evaluation = tqdm(total=batches, desc=f"{self.stage}, evaluation", unit="batch", leave=False)
        self.evaluation.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.evaluation is not None:
            self.evaluation.close()
        self.evaluation = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.shown |= {label: f"{logs[key]:.3g}" for key, label in self.SHOWN.items() if key in logs}
        if self.stage == "ppo":
            self.shown.pop("loss", None)
        if self.bar is not None:
            left = self._say_what_is_left(state)
            self.bar.set_postfix(self.shown | ({"run": left} if left else {}))

    def _say_what_is_left(self, state: Any) -> str:
        """Write `progress.json`, unless that was done a moment ago. Returns what is left in words."""
        done, now = state.global_step - self.first_step, time.monotonic()
        progress: Progress = {
            "stage": self.stage,
            "round": self.round,
            "step": state.global_step,
            "steps": state.max_steps,
            "seconds": None,
            "then": [part.name for part in self.later if part.seconds is None],
        }
        if done:
            pace = (now - self.started) / done  # with the evaluations and checkpoints among the steps
            progress["seconds"] = seconds_left((state.max_steps - state.global_step) * pace, self.later)
        if self.file is not None and now - self.written > WRITE_EVERY:
            write_json(self.file, progress)
            self.written = now
        return left_words(progress)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None
