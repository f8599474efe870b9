"""Asking reward functions of TRL's `reward_funcs` signature: the asynchronous ones at once, and none for ever."""

import asyncio
import functools
import inspect
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from trl.data_utils import is_conversational
from trl.trainer.utils import get_callable_name

from ..data.prepare import OURS
from ..records.files import Row, write_text

FAILED = "rollout-that-failed.jsonl"  # in a stage's folder: what was asked of the last function that failed there

RewardFunc = Callable[..., Any]


def call_reward_func(
    reward_func: RewardFunc, rows: Sequence[Row], completion_ids: list[list[int]], texts: list[str], state: Any
) -> Tensor:
    """What one function says: see `call_reward_funcs`."""
    name = get_callable_name(reward_func)
    return call_reward_funcs({name: reward_func}, rows, completion_ids, texts, state)[name]


def call_reward_funcs(
    reward_funcs: Mapping[str, RewardFunc],
    rows: Sequence[Row],
    completion_ids: list[list[int]],
    texts: list[str],
    state: Any,
    timeout: float | None = None,
    folder: Path | None = None,
) -> dict[str, Tensor]:
    """Call functions about the same responses, the asynchronous ones all at once.

    Args:
        rows: the data rows; `prompt` goes as `prompts`, the source's other columns under their own names.
        texts: the responses; to conversational prompts they go as messages.
        state: the TrainerState, as `trainer_state`.
        timeout: seconds that a function may take; None: any.
        folder: keeps the rows with their responses (`FAILED`) where a function fails; None: nothing is kept.
    Returns:
        (B,) for each name, with 0 where the function returned None, as in TRL.
    Raises:
        ValueError: naming the function, if it does not return one finite number (or None) a row, or not in time, or
            ends the process.
        Whatever a function raises, with a note that names it.
    """
    asked = _Asked(rows, completion_ids, texts, folder)
    results = {}
    for name, reward_func in reward_funcs.items():
        with asked.named(name):
            call = functools.partial(reward_func, **asked.arguments(), trainer_state=state)
            results[name] = call() if timeout is None else _in_thread(call, timeout)
    waiting = {name: result for name, result in results.items() if inspect.isawaitable(result)}
    if waiting:
        answers: dict[str, Any] = {}
        try:
            # In a notebook this thread has an event loop already, and one that a function blocks can only be left.
            _in_thread(functools.partial(asyncio.run, _together(waiting, answers, asked)), timeout)
        except _Late as late:
            raise asked.refusal(" and ".join(repr(n) for n in waiting if n not in answers), str(late)) from late
        results |= answers
    return {name: asked.checked(name, result) for name, result in results.items()}


class _Late(Exception):
    """A function has not answered in time."""


def _in_thread(call: Callable[[], Any], timeout: float | None) -> Any:
    """What the call returns. Where it is late, or a signal ends the run, its thread goes on until the process ends."""
    answer, with_gradients = Future[Any](), torch.is_grad_enabled()

    def work() -> None:
        try:
            with torch.set_grad_enabled(with_gradients):  # which a thread does not inherit
                answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    Thread(target=work, daemon=True).start()
    try:
        return answer.result(timeout)
    except TimeoutError as error:
        if answer.done():  # the function's own
            raise
        said = f"has not answered within {timeout:g} seconds (ppo.reward_timeout)"
        raise _Late(f"{said}. The same command goes on from the last checkpoint.") from error


async def _together(waiting: Mapping[str, Awaitable[Any]], answers: dict[str, Any], asked: "_Asked") -> None:
    """Put what the functions return into `answers`. The first that raises ends all."""

    async def one(name: str) -> None:
        with asked.named(name):
            answers[name] = await waiting[name]

    await asyncio.gather(*map(one, waiting))


@dataclass(frozen=True)
class _Asked:
    """What functions are asked about: see `call_reward_funcs`."""

    rows: Sequence[Row]
    completion_ids: list[list[int]]
    texts: list[str]
    folder: Path | None

    def arguments(self) -> dict[str, list[Any]]:
        """Those of TRL's signature, a value for each row, without the state."""
        prompts: list[Any] = [row["prompt"] for row in self.rows]
        conversational = is_conversational({"prompt": prompts[0]})
        messages = [[{"role": "assistant", "content": text}] for text in self.texts]
        return {
            "prompts": prompts,
            "completions": messages if conversational else self.texts,
            "completion_ids": self.completion_ids,
            **{key: [row[key] for row in self.rows] for key in self.rows[0] if key not in OURS},
        }

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        """Whatever is raised in the block gets a note of which function was asked about what."""
        try:
            yield
        except _Late as error:
            raise self.refusal(repr(name), str(error)) from error
        except SystemExit as error:  # which would end the run without a word
            raise self.refusal(repr(name), f"ended the process ({error!r}).") from error
        except Exception as error:
            error.add_note(f"In the reward function {name!r}. {self.kept()}")
            raise

    def refusal(self, names: str, said: str) -> ValueError:
        """The error that says what is wrong with functions."""
        return ValueError(f"The reward function {names} {said} {self.kept()}")

    def kept(self) -> str:
        """Keep the rows with their responses. Returns what the functions were asked about, and where that is."""
        first = self.rows[0]
        number = f"row {first['prompt_row']}, " if "prompt_row" in first else ""
        said = f"It was asked about {len(self.rows)} responses, the first to {number}{first['prompt']!r:.200}"
        if self.folder is None:
            return f"{said}."
        numbers = {"prompt_row": [row["prompt_row"] for row in self.rows]} if number else {}
        columns = {**numbers, **self.arguments()}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / FAILED
        write_text(path, "".join(json.dumps(row, default=str) + "\n" for row in rows))
        return f"{said}; all are in {path}."

    def checked(self, name: str, result: Any) -> Tensor:
        """What a function has returned as one finite number for each response (B,). Raises ValueError."""
        result = result.tolist() if hasattr(result, "tolist") else result  # an array, or a tensor
        if not isinstance(result, Sequence):
            found = "nothing" if result is None else f"{result!r:.200}, which is no list,"
            raise self.refusal(repr(name), f"returned {found} for {len(self.texts)} responses.")
        if len(result) != len(self.texts):
            raise self.refusal(repr(name), f"returned {len(result)} rewards for {len(self.texts)} responses.")
        scores = torch.tensor([_number(value) for value in result])
        if not scores.isfinite().all():
            row = int((~scores.isfinite()).nonzero()[0])
            number = f", to row {self.rows[row]['prompt_row']}" if "prompt_row" in self.rows[row] else ""
            said = f"returned {result[row]!r:.200} for the response {self.texts[row]!r:.200}{number}."
            raise self.refusal(repr(name), said)
        return scores


def _number(value: Any) -> float:
    """A reward as a number; not a finite one where it is none."""
    try:
        return 0.0 if value is None else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # as its type has it
        return torch.nan
