"""What watches a stage's trainer: the recorder of its logs, and the bar on the terminal."""

from typing import Any, ClassVar

from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..records.recorder import Recorder


class RecordLogs(TrainerCallback):
    """Hands each logged row to the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.recorder.metrics(state.global_step, logs)


class StartOnce(TrainerCallback):
    """`eval_on_start` is for training's start: from a checkpoint on, it would evaluate one step a second time."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        args.eval_on_start = args.eval_on_start and not state.global_step


class Progress(TrainerCallback):
    """A progress bar over the stage's steps with the numbers that matter in it, and one over each evaluation."""

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

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.shown: dict[str, str] = {}
        self.bar: tqdm | None = None  # while training goes on
        self.evaluation: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
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
            self.bar.set_postfix(self.shown)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None
