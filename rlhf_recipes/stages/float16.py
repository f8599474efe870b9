"""Training in float16: losses are scaled up, so that small gradients do not vanish; steps that overflow are skipped.

The scale halves with each step that overflows and doubles after 2,000 that do not (torch.amp.GradScaler; Micikevicius
et al., "Mixed Precision Training", arXiv:1710.03740, section 3.2).
"""

from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback

SKIPPED = "skipped_steps"  # in a log: optimizer steps since the last one that overflowed, and changed nothing


def scale_losses(accelerator: Accelerator) -> None:
    """Let an accelerator of mixed precision `fp16` do on a CPU what it does on a GPU: accelerate does nothing there."""
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler(accelerator.device.type)


def check_scale(scaler: torch.amp.GradScaler) -> None:
    """Raises ValueError where steps overflow although no loss is scaled up any more."""
    if scaler.is_enabled() and scaler.get_scale() < 1:
        raise ValueError(
            "Training in float16 overflows at every scale of the loss: set base.dtype=bfloat16, or lower the learning "
            "rate."
        )


class CountSkippedSteps(TrainerCallback):
    """Adds the optimizer steps that were skipped to each log, and stops a run that skips them all."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.skipped = accelerator, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        # A fused optimizer looks for overflow in its own kernel, of which accelerate, and so the learning-rate
        # schedule, would hear nothing. Without this mark the scaler looks, and does not call it.
        optimizer.optimizer._step_supports_amp_scaling = False

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.skipped += self.accelerator.optimizer_step_was_skipped
        assert self.accelerator.scaler is not None
        check_scale(self.accelerator.scaler)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.setdefault(SKIPPED, self.skipped)  # PPO's trainer, which takes several steps at a time, has its own
            self.skipped = 0
