"""Stopping in good order, at a signal or by the clock: behind a checkpoint, from which the run goes on."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from transformers import TrainerCallback

from ..model.processes import broadcast, count, is_main

BY_THE_CLOCK = 128 + signal.SIGTERM  # the exit code, as if the clock had sent that signal
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes of a run that was stopped


class Stopped(KeyboardInterrupt):
    """The run was stopped. Args: the process's exit code, 128 and the signal's number."""

    @property
    def code(self) -> int:
        """The process's exit code."""
        return self.args[0]


class StoppedInside(Stopped):
    """The run was stopped in the middle of a step, or of the evaluation behind one. What was whole is still to save."""


class StopInOrder(TrainerCallback):
    """Ends a stage's training with `Stopped` at SIGINT, SIGTERM or a time, once what is whole has a checkpoint.

    Of an update of PPO all is finished first. A step of another stage ends behind its next micro-batch, and an
    evaluation behind its next batch: see `SharesBatches`, which saves the last whole step then.

    The Trainer's own way to stop early would not do: its checkpoint says that training is over. A second signal, and
    one while nothing trains, stops at once.
    """

    def __init__(self, at: datetime | None = None) -> None:
        """
        Args:
            at: when to stop, by the clock of now, whatever it is set to later; a time without a zone is the machine's.
        """
        self.deadline = None if at is None else time.monotonic() + at.timestamp() - time.time()
        self.code: int | None = None  # set: the process is to exit with this
        self.is_training = False

    @property
    def at(self) -> float | None:
        """When it stops, in seconds since 1970, by the clock of now."""
        return None if self.deadline is None else self.deadline - time.monotonic() + time.time()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A block in which it hears signals. Python gives those to the main thread alone: elsewhere it hears none.

        Of several processes the main one hears SIGINT for all, and SIGTERM is how the launcher ends them at once.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        heard = self._hear if is_main() else signal.SIG_IGN
        numbers = (signal.SIGINT, signal.SIGTERM) if count() == 1 else (signal.SIGINT,)
        before = {number: signal.signal(number, heard) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: Any) -> None:
        at_once = self.code is not None or not self.is_training
        self.code = 128 + number
        if at_once:
            raise Stopped(self.code)
        print("\nstopping once what was done is saved; once more stops at once", file=sys.stderr, flush=True)

    def check(self) -> None:
        """Raises Stopped where a signal or the time has come, in a thread that waits and trains nothing."""
        self._look_at_clock()
        if self.code is not None:
            raise Stopped(self.code)

    def _look_at_clock(self) -> None:
        if self.code is None and self.deadline is not None and time.monotonic() >= self.deadline:
            self.code = BY_THE_CLOCK

    def _is_asked(self) -> bool:
        """Whether it is to stop now: in all processes where the main one is."""
        self._look_at_clock()
        self.code = broadcast(self.code)
        return self.code is not None

    def between_parts(self) -> None:
        """Raises Stopped where it is time: called between two parts of a run, where that loses nothing."""
        if self._is_asked():
            raise Stopped(self.code)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.between_parts()
        self.is_training = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_asked():  # the loss since the last row would be lost: it is no part of a checkpoint
            control.should_save = control.should_log = True

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_training and self._is_asked():
            raise StoppedInside(self.code)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_substep_end(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_training and self._is_asked():  # the Trainer saves behind an evaluation between two steps
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.code is not None:
            self.is_training = False
            raise Stopped(self.code)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.is_training = False
