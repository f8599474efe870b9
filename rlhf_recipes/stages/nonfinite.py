"""Steps whose loss or gradient is not finite: none of them changes an adapter.

In float16 such steps are part of the method and are left to its scaler (see `float16`).
"""

import logging
import math
from typing import Any

import torch
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

MOST = 10  # steps in a row that `skip` leaves out: with more of them nothing is learned any more


class NonFinite:
    """Answers steps that are not finite as `on_nonfinite` says."""

    def __init__(self, stage: str, mode: str) -> None:
        self.stage, self.mode = stage, mode
        self.in_a_row = 0

    def passed(self) -> None:
        """Note a step that was finite."""
        self.in_a_row = 0

    def left_out(self, step: int, what: str) -> None:
        """Note one that was not, and that the caller leaves out. Raises ValueError where that is the end.

        Args:
            step: its number, from 1.
            what: is not finite.
        """
        self.in_a_row += 1
        name = f"{'update' if self.stage == 'ppo' else 'step'} {step} of {self.stage}"
        said = f"At {name} {what} is not finite, and nothing was changed by it."
        if self.mode == "stop":
            raise ValueError(
                f"{said} Run again with {self.stage}.on_nonfinite=skip, which leaves such steps out, to go on from the "
                f"last checkpoint, or with a lower {self.stage}.learning_rate in a new --run-dir."
            )
        if self.in_a_row > MOST:
            raise ValueError(
                f"{said} So it was {MOST} times before: lower {self.stage}.learning_rate, in a new --run-dir."
            )
        logger.warning("%s", said)


class LeaveOutNonFinite(TrainerCallback):
    """Leaves steps out of a stage of TRL's whose gradients are not finite."""

    def __init__(self, stage: str, mode: str) -> None:
        self.answer = NonFinite(stage, mode)

    def on_pre_optimizer_step(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        if torch.nn.utils.get_total_norm(parameter.grad for parameter in parameters).isfinite():
            return self.answer.passed()
        for parameter in parameters:
            parameter.grad = None  # which an optimizer passes over
        batches = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)  # in an epoch, a step takes one
        epoch, batch = divmod(state.global_step, batches)
        self.answer.left_out(
            state.global_step + 1, f"the gradient of batch {batch + 1} of {batches} of epoch {epoch + 1}"
        )
