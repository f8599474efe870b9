"""Reward functions: what they are given, and what they may return."""

import asyncio
import threading
from typing import Any

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


def test_a_reward_function_that_hangs_ends_the_run_in_time(make: Make) -> None:
    let_go = threading.Event()

    def hangs(**kwargs: Any) -> list[float]:
        let_go.wait(60)
        return [0.0] * 4

    async def sleeps(**kwargs: Any) -> list[float]:
        await asyncio.sleep(60)
        return [0.0] * 4

    def is_late_itself(**kwargs: Any) -> list[float]:
        raise TimeoutError("the server's")

    async def is_late_too(**kwargs: Any) -> list[float]:
        raise TimeoutError("the server's")

    for function in (hangs, sleeps):
        trainer = make(reward_funcs=function, reward_timeout=0.05)
        late = rf"'{function.__name__}' has not answered within 0.05 seconds \(ppo.reward_timeout\)"
        with pytest.raises(ValueError, match=late):
            trainer.train()
    let_go.set()
    for function in (is_late_itself, is_late_too):
        with pytest.raises(TimeoutError, match="the server's") as raised:
            call_reward_funcs({"mine": function}, [{"prompt": "w5"}], [[5]], ["w6"], None, timeout=30)
        assert raised.value.__notes__ == ["In the reward function 'mine', asked about 1 responses, the first to 'w5'"]


def test_a_function_with_a_limit_keeps_the_gradients_off() -> None:
    def asks_torch(prompts: list[str], **kwargs: Any) -> list[bool]:
        return [torch.is_grad_enabled()] * len(prompts)

    with torch.no_grad():
        found = call_reward_funcs({"mine": asks_torch}, [{"prompt": "w5"}], [[5]], ["w6"], None, timeout=30)
    assert found["mine"].tolist() == [0.0]
