"""What the stages' trainers need so that several processes train as one does.

transformers' and TRL's trainers believe that they are alone (see `model.processes`): every process goes through the
whole run's batches in one order, and its optimizer takes the same steps.
"""

import copy
import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..model.processes import all_gather, all_sum_, broadcast, count, is_main, rank
from ..records.checkpoints import seal
from .stop import StoppedInside

RUNNING_SUMS = (
    "_tr_loss",
    "_metrics",
    "_total_train_tokens",
    "current_flos",
)  # transformers' and TRL's, of rows to log
SHARE = "share"  # in a batch: which part of the whole batch's rows it has


class WritesOnce(Trainer):
    """A Trainer whose main process writes the checkpoints; any number of processes can go on from one.

    Older ones are deleted once the new one is on disk, and by their steps: transformers deletes them before that, and
    by the clock, which may have been set back.
    """

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if is_main():
            limit, self.args.save_total_limit = self.args.save_total_limit, None
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit = limit
            folder = str(self.args.output_dir)
            seal(Path(folder, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"))
            rotate_checkpoints(folder, limit, self.state.best_model_checkpoint)
        self.state.best_model_checkpoint = broadcast(self.state.best_model_checkpoint)


def remember_random_numbers() -> Callable[[], None]:
    """Look where the generators are that a checkpoint keeps. Returns a function that takes them back there."""
    python, arrays, tensors = random.getstate(), np.random.get_state(), torch.get_rng_state()
    of_gpus = torch.cuda.get_rng_state_all()  # none without one

    def take_back() -> None:
        random.setstate(python)
        np.random.set_state(arrays)
        torch.set_rng_state(tensors)
        torch.cuda.set_rng_state_all(of_gpus)

    return take_back


@dataclass(frozen=True)
class LastStep:
    """What a checkpoint of the last whole step has to hold, and the next step, or an evaluation, has changed."""

    row: tuple[Any, ...]  # what the Trainer logs a row of it with, beside the loss
    named: dict[str, Any]  # the same, by name
    sums: dict[str, Any]  # behind the step and its evaluation; none while that goes on, which changes none
    take_back_random_numbers: Callable[[], None] = field(default_factory=remember_random_numbers)


class SharesBatches(WritesOnce):
    """A Trainer of which each process trains on its share of a batch's rows, and steps along the sum of all gradients.

    Held-out rows are few, and each process evaluates all of them.

    Stopped in the middle of a step it writes the checkpoint that it could have written before that step, which changes
    no weight before it ends. Stopped in an evaluation it writes the one that would have followed, and that training
    goes on with the evaluation.
    """

    last_step: LastStep | None = None  # None until this process has made one
    owes_evaluation = False  # of the step of the checkpoint that training goes on from

    def get_train_dataloader(self) -> DataLoader:
        whole = self.data_collator
        self.data_collator = functools.partial(collate_share, whole)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = whole

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """The tokens of all processes: by them a share's loss is divided, so that the shares add up to the mean."""
        items = super()._get_num_items_in_batch(batch_samples, device)
        if torch.is_tensor(items):
            all_sum_([items])
        return items

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss of a share of a batch, which is a sum over tokens, or a mean over rows that counts for less."""
        share = inputs.pop(SHARE, 1.0)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss * share if num_items_in_batch is None and not return_outputs else loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'. Raises Stopped once what is whole is saved."""
        try:
            return super().train(*args, **kwargs)
        except StoppedInside:
            if self.last_step is not None:
                self._save_last_step(self.last_step)
            raise

    def _save_last_step(self, last: LastStep) -> None:
        owes_evaluation = self.control.should_evaluate  # it is True until the evaluation has come to its end
        last.take_back_random_numbers()
        vars(self).update(last.sums)
        self.model.train()  # which names the numbers of the row that is logged
        self.control.should_log, self.control.should_evaluate, self.control.should_save = True, False, False
        super()._maybe_log_save_evaluate(self._tr_loss, *last.row, **last.named)
        self.control.should_evaluate = owes_evaluation
        if not Path(str(self.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}").exists():
            self._save_checkpoint(self.model, None)

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *row: Any, **named: Any) -> None:
        self.last_step = LastStep(row, named, {})
        super()._maybe_log_save_evaluate(tr_loss, *row, **named)
        self.last_step = LastStep(row, named, copy.deepcopy({name: getattr(self, name) for name in RUNNING_SUMS}))

    def evaluate_what_is_owed(self) -> None:
        """Run the evaluation, if there is one, in which training was stopped behind the step that it goes on from."""
        if self.owes_evaluation:
            self.owes_evaluation = False
            self._determine_best_metric(self._evaluate(None, None), None)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.evaluate_what_is_owed()  # with the checkpoint's random numbers, which the Trainer has just read
        with gathering(self.accelerator, has_rows=bool(inputs.get(SHARE, 1.0))):
            loss = super().training_step(model, inputs, num_items_in_batch).clone()
        if self.accelerator.sync_gradients:
            all_sum_([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        all_sum_([loss])
        return loss


def collate_share(collate: Callable[[list], dict[str, Any]], rows: list) -> dict[str, Any]:
    """A batch of this process's share of the rows; where it has none, of a row that weighs nothing."""
    if count() == 1:
        return collate(rows)
    own = rows[rank() :: count()]
    batch = collate(own or rows[:1])
    if not own and "labels" in batch:
        batch["labels"] = torch.full_like(batch["labels"], -100)
    return {**batch, SHARE: torch.tensor(len(own) / len(rows))}


@contextmanager
def gathering(accelerator: Any, has_rows: bool) -> Iterator[None]:
    """A block in which TRL, where it gathers its metrics, finds those of all processes that have rows."""

    def gather(value: Tensor) -> Tensor:
        own = value.detach().cpu().reshape(-1, *value.shape[1:])
        return torch.cat(all_gather(own if has_rows else own[:0])).to(value.device)

    if count() > 1:
        accelerator.gather = accelerator.gather_for_metrics = gather
    try:
        yield
    finally:
        if count() > 1:
            del accelerator.gather, accelerator.gather_for_metrics


class StopTogether(TrainerCallback):
    """Lets all processes stop, log, evaluate and save where the main one does, whatever a clock or a card has said."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        vars(control).update(broadcast(vars(control)))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step_end(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step_end(args, state, control)
