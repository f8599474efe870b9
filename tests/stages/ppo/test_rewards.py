"""Reward functions: what they are given, and what they may return."""

import asyncio
import contextlib
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from support.ppo import (
    PROMPTS,
    Make,
    rows_of,
    share_of_w7,
)
from torch import Tensor

from rlhf_recipes.records.files import read_rows
from rlhf_recipes.stages.reward_functions import call_reward_funcs


def test_reward_functions_get_the_rows_and_their_sum_is_the_score(make: Make) -> None:
    seen: dict[str, Any] = {}

    def numbers(prompts: Any, completions: Any, completion_ids: Any, trainer_state: Any, **columns: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, state=trainer_state, columns=columns)
        return [10.0 * n for n in columns["number"]]

    async def lengths(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
        await asyncio.sleep(0)
        return [None if n == 0 else float(len(ids)) for n, ids in enumerate(completion_ids)]

    trainer = make(reward_funcs=[numbers, lengths])
    rows = rows_of(PROMPTS[:4])
    rollout = trainer.advantages(trainer.rollout(rows))
    tokens = rollout.lengths.tolist()
    assert rollout.scores.tolist() == [0.0, 10.0 + tokens[1], 20.0 + tokens[2], 30.0 + tokens[3]]
    assert seen["prompts"] == [row["prompt"] for row in rows] and seen["columns"] == {"number": [0, 1, 2, 3]}
    assert seen["ids"] == rollout.responses() and seen["state"] is trainer.state
    words = [" ".join(f"w{i}" for i in ids if i > 3) for ids in rollout.responses()]
    assert seen["completions"] == words
    trainer.train()
    logged = trainer.state.log_history[0]
    assert {"rewards/numbers/mean", "rewards/lengths/mean"} <= logged.keys()


def test_conversational_prompts_get_messages(make: Make) -> None:
    seen = []

    def judge(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    rows = [{"prompt_ids": p, "prompt": [{"role": "user", "content": f"w{p[0]}"}]} for p in PROMPTS]
    trainer = make(train_dataset=Dataset.from_list(rows), reward_funcs=judge)
    rollout = trainer.advantages(trainer.rollout(rows))
    texts = trainer.sampler.texts(rollout, conversational=True)
    assert seen == [
        (row["prompt"], [{"role": "assistant", "content": text}]) for row, text in zip(rows, texts, strict=True)
    ]


@pytest.mark.parametrize("result", [[1.0] * 3, [1.0] * 5, []])
def test_a_wrong_number_of_rewards_names_the_function(make: Make, result: list[float]) -> None:
    def miscounting(**kwargs: Any) -> list[float]:
        return result

    trainer = make(reward_funcs=miscounting)
    with pytest.raises(ValueError, match=rf"'miscounting' returned {len(result)} rewards for 4 responses"):
        trainer.advantages(trainer.rollout(rows_of(PROMPTS[:4])))


def test_two_reward_functions_of_one_name_are_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"Two reward functions have one name: share_of_w7, share_of_w7"):
        make(reward_funcs=[share_of_w7, share_of_w7])


def test_an_async_reward_function_works_inside_a_running_event_loop(make: Make) -> None:
    async def ones(prompts: list[str], **kwargs: Any) -> list[float]:
        await asyncio.sleep(0)
        return [1.0] * len(prompts)

    trainer, rows = make(reward_funcs=ones), rows_of(PROMPTS[:4])

    async def notebook_cell() -> Tensor:
        return trainer.rewards.function_scores({"ones": ones}, rows, trainer.sampler.sample("policy", PROMPTS[:4]))[
            "ones"
        ]

    assert asyncio.run(notebook_cell()).tolist() == [1.0] * 4


def test_async_reward_functions_are_asked_at_once() -> None:
    """Each waits for the other, so that one after another they would never end."""
    came: dict[str, asyncio.Event] = {}

    def waits_for(own: str, other: str) -> Any:
        async def rewards(prompts: list[str], **kwargs: Any) -> list[float]:
            for name in (own, other):
                came.setdefault(name, asyncio.Event())
            came[own].set()
            await came[other].wait()
            return [float(len(own))] * len(prompts)

        return rewards

    functions = {"one": waits_for("one", "three"), "three": waits_for("three", "one")}
    found = call_reward_funcs(functions, [{"prompt": "w5"}], [[5]], ["w6"], None, timeout=30)
    assert {name: scores.tolist() for name, scores in found.items()} == {"one": [3.0], "three": [5.0]}


async def sleeps(**kwargs: Any) -> list[float]:
    await asyncio.sleep(60)
    return [0.0]


async def blocks_its_loop(**kwargs: Any) -> list[float]:
    time.sleep(60)
    return [0.0]


async def swallows_its_end(**kwargs: Any) -> list[float]:
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)


def hangs(**kwargs: Any) -> list[float]:
    time.sleep(60)
    return [0.0]


def ask(function: Any, **options: Any) -> list[float]:
    """What a function says of one response."""
    return call_reward_funcs({"mine": function}, [{"prompt": "w5"}], [[5]], ["w6"], None, **options)["mine"].tolist()


@pytest.mark.parametrize("function", [hangs, sleeps, blocks_its_loop, swallows_its_end])
def test_a_reward_function_that_hangs_ends_the_run_in_time(make: Make, function: Any) -> None:
    trainer = make(reward_funcs=function, reward_timeout=0.05)
    late = rf"'{function.__name__}' has not answered within 0.05 seconds \(ppo.reward_timeout\)"
    with pytest.raises(ValueError, match=late):
        trainer.train()


def test_of_several_async_functions_the_late_one_is_named() -> None:
    async def answers(**kwargs: Any) -> list[float]:
        return [1.0]

    with pytest.raises(ValueError, match=r"^The reward function 'late' has not"):
        functions = {"in time": answers, "late": sleeps}
        call_reward_funcs(functions, [{"prompt": "w5"}], [[5]], ["w6"], None, timeout=0.1)


def test_a_timeout_of_the_functions_own_is_its_own_error() -> None:
    def is_late_itself(**kwargs: Any) -> list[float]:
        raise TimeoutError("the server's")

    async def is_late_too(**kwargs: Any) -> list[float]:
        raise TimeoutError("the server's")

    for function in (is_late_itself, is_late_too):
        with pytest.raises(TimeoutError, match="the server's") as raised:
            ask(function, timeout=30)
        (note,) = raised.value.__notes__
        assert note == "In the reward function 'mine'. It was asked about 1 responses, the first to 'w5'."


@pytest.mark.parametrize("function", [hangs, sleeps, blocks_its_loop, swallows_its_end])
def test_a_signal_ends_the_wait_for_a_function_and_lets_the_process_end(function: Any) -> None:
    """Python waits at its end for the threads of an executor, and for no daemon."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    threads, before = threading.enumerate(), signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(KeyboardInterrupt):
            ask(function)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert all(thread.daemon for thread in threading.enumerate() if thread not in threads)


def test_a_reward_function_that_raises_keeps_the_rollout(make: Make) -> None:
    def raises(prompts: list[str], number: list[int], **kwargs: Any) -> list[float]:
        raise KeyError(number[0])

    async def raises_later(number: list[int], **kwargs: Any) -> list[float]:
        raise KeyError(number[0])

    for function in (raises, raises_later):
        trainer = make(reward_funcs=function)
        rows = [{**row, "prompt_row": 7 + n} for n, row in enumerate(rows_of(PROMPTS[:4]))]
        with pytest.raises(KeyError) as raised:
            trainer.rollout(rows)
        path = Path(str(trainer.args.output_dir)) / "rollout-that-failed.jsonl"
        name, first = function.__name__, rows[0]["prompt"]
        said = f"It was asked about 4 responses, the first to row 7, {first!r}; all are in {path}."
        assert f"In the reward function {name!r}. {said}" in raised.value.__notes__
        kept = read_rows(path)
        assert [row["prompt_row"] for row in kept] == [7, 8, 9, 10]
        assert [row["prompts"] for row in kept] == [row["prompt"] for row in rows]
        assert [row["number"] for row in kept] == [0, 1, 2, 3] and all(row["completions"] for row in kept)
        path.unlink()


def test_a_reward_function_that_ends_the_process_is_named() -> None:
    def exits(**kwargs: Any) -> list[float]:
        raise SystemExit(7)

    async def exits_later(**kwargs: Any) -> list[float]:
        raise SystemExit(7)

    for function in (exits, exits_later):
        for timeout in (None, 30):
            with pytest.raises(ValueError, match=r"^The reward function 'mine' ended the process \(SystemExit\(7\)\)"):
                ask(function, timeout=timeout)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (None, "nothing"),
        (1.0, "1.0, which is no list,"),
        (torch.tensor(1.0), "1.0, which is no list,"),
        ({0: 1.0}, "{0: 1.0}, which is no list,"),
        ((n for n in [1.0]), "<generator .*, which is no list,"),
        (["high"], "'high' for the response 'w6'"),
        ([[1.0]], r"\[1.0\] for the response"),
        ([{"score": 1.0}], r"{'score': 1.0} for the response"),
        ([10**400], "1000*"),
        ([1e39], "1e[+]39 for the response"),  # no number of 32 bits
        (torch.ones(1, 2), r"\[1.0, 1.0\] for the response"),
        ([torch.ones(2)], r"tensor\(\[1., 1.\]\) for the response"),
        ([torch.nan], "nan for the response"),
    ],
)
def test_what_is_no_list_of_numbers_is_refused(result: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"^The reward function 'mine' returned {said}"):
        ask(lambda **kwargs: result)


def test_what_can_be_read_as_numbers_is_taken() -> None:
    class Later:
        def __await__(self) -> Any:
            yield from ()
            return [4.0]

    given = ([1], (2.0,), np.array([3.0]), Later(), torch.tensor([5], dtype=torch.bfloat16), [torch.tensor(6.0)])
    assert [ask(lambda result=result, **kwargs: result) for result in given] == [[float(n)] for n in range(1, 7)]


def test_a_function_with_a_limit_keeps_the_gradients_off() -> None:
    def asks_torch(prompts: list[str], **kwargs: Any) -> list[bool]:
        return [torch.is_grad_enabled()] * len(prompts)

    with torch.no_grad():
        found = call_reward_funcs({"mine": asks_torch}, [{"prompt": "w5"}], [[5]], ["w6"], None, timeout=30)
    assert found["mine"].tolist() == [0.0]
