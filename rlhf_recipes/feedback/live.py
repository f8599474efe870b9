"""Prompts that people type on the page: two responses come while they wait, and are judged on the spot."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

from ..records.files import writing_in
from .board import Board
from .rows import Row

Show = Callable[[int, str], None]  # takes the place of a response, 0 or 1, and its text so far


class Asked(NamedTuple):
    """A typed prompt with two responses."""

    sample: Row  # with its `id`
    order: list[int]  # the indices of the responses in the order in which they were shown


# Has a prompt answered, in a thread of its own. Raises ValueError where it cannot be, or there is nothing to judge.
Answerer = Callable[[str, Show], Asked]


async def ask(board: Board, labeler: str, prompt: str, answer: Answerer, turn: asyncio.Lock) -> AsyncIterator[str]:
    """Have a prompt answered and give the sample to who typed it, also where he leaves while it is answered.

    Who leaves before his turn has come, of which there is one at a time, is not answered.

    Yields a JSON object a line: `{"side": 0, "text": "so far"}`, and at last the labeler's `state` or an `error`.
    """
    loop, lines = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any] | None]()

    def say(line: dict[str, Any] | None) -> None:
        loop.call_soon_threadsafe(lines.put_nowait, line)

    def work() -> Asked:
        with writing_in(board.labels.path):
            return answer(prompt, lambda side, text: say({"side": side, "text": text}))

    def conclude(done: asyncio.Future[Asked]) -> None:
        try:
            board.add(labeler, *done.result())
            lines.put_nowait({"state": board.state(labeler)})
        except ValueError as error:
            lines.put_nowait({"error": str(error)})
        finally:
            turn.release()
            lines.put_nowait(None)

    await turn.acquire()
    loop.run_in_executor(None, work).add_done_callback(conclude)
    while (line := await lines.get()) is not None:
        yield json.dumps(line) + "\n"
