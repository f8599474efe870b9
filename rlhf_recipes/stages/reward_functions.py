"""Asking reward functions of TRL's `reward_funcs` signature: the asynchronous ones at once, and none for ever."""

import asyncio
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from trl.data_utils import is_conversational
from trl.trainer.utils import get_callable_name

from ..records.files import Row

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
) -> dict[str, Tensor]:
    """Call functions about the same responses, the asynchronous ones all at once.

    Args:
        rows: the data rows; `prompt` goes as `prompts`, every other column but `prompt_ids` under its own name.
        texts: the responses; to conversational prompts they go as messages.
        state: the TrainerState, as `trainer_state`.
        timeout: seconds that a function may take; None: any.
    Returns:
        (B,) for each name, with 0 where the function returned None, as in TRL.
    Raises:
        ValueError: naming the function, if it does not return one finite number (or None) a row, or not in time.
        Whatever a function raises, with a note that names it.
    """
    prompts = [row["prompt"] for row in rows]
    conversational = is_conversational({"prompt": prompts[0]})
    asked = {
        "prompts": prompts,
        "completions": [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts,
        "completion_ids": completion_ids,
        "trainer_state": state,
        **{key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt", "prompt_ids")},
    }
    results = {}
    for name, reward_func in reward_funcs.items():
        with _named(name, prompts):
            results[name] = _in_time(name, lambda func=reward_func: func(**asked), timeout)
    waiting = {name: result for name, result in results.items() if inspect.iscoroutine(result)}
    if waiting:
        with ThreadPoolExecutor(1) as thread:  # in a notebook this thread has an event loop already
            results |= thread.submit(asyncio.run, _together(waiting, prompts, timeout)).result()
    return {name: _checked(name, result, texts) for name, result in results.items()}


def _in_time(name: str, call: Callable[[], Any], timeout: float | None) -> Any:
    """What the call returns. With a limit it runs in a thread, which goes on where it is late, until the run ends."""
    if timeout is None:
        return call()
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
        raise _late(name, timeout) from error


async def _together(waiting: dict[str, Any], prompts: Sequence[Any], timeout: float | None) -> dict[str, Any]:
    """What the coroutines return. The first that raises, or is late, ends all."""

    async def one(name: str, coroutine: Any) -> Any:
        with _named(name, prompts):
            limit = asyncio.timeout(timeout)
            try:
                async with limit:
                    return await coroutine
            except TimeoutError as error:
                if not limit.expired():  # the function's own
                    raise
                raise _late(name, timeout) from error

    answers = await asyncio.gather(*(one(name, coroutine) for name, coroutine in waiting.items()))
    return dict(zip(waiting, answers, strict=True))


def _late(name: str, timeout: float | None) -> ValueError:
    return ValueError(
        f"The reward function {name!r} has not answered within {timeout:g} seconds (ppo.reward_timeout). The same "
        "command goes on from the last checkpoint."
    )


@contextmanager
def _named(name: str, prompts: Sequence[Any]) -> Iterator[None]:
    """Whatever is raised in the block gets a note of which function was asked about what."""
    try:
        yield
    except Exception as error:
        error.add_note(
            f"In the reward function {name!r}, asked about {len(prompts)} responses, the first to {prompts[0]!r:.200}"
        )
        raise


def _checked(name: str, result: Any, texts: list[str]) -> Tensor:
    """One finite number for each response (B,). Raises ValueError."""
    if result is None or len(result) != len(texts):
        count = "nothing" if result is None else f"{len(result)} rewards"
        raise ValueError(f"The reward function {name!r} returned {count} for {len(texts)} responses.")
    scores = torch.tensor([0.0 if value is None else float(value) for value in result])
    if not scores.isfinite().all():
        row = int((~scores.isfinite()).nonzero()[0])
        raise ValueError(f"The reward function {name!r} returned {result[row]} for the response {texts[row]!r}.")
    return scores
