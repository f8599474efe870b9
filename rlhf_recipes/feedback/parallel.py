"""Many questions at once, and what becomes of them where a model no longer answers."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from .client import Client, NoCompletion

T = TypeVar("T")
MOST = 1_000  # questions at once, whatever is asked for: each costs a task, also where there are fewer


def run_to_end(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end; in a thread of its own where a loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, work).result()


async def in_parallel(work: Callable[[T], Awaitable[None]], items: Iterable[T], parallel: int) -> None:
    """Await `work` on every item, on at most `parallel` at a time. The first error ends it all."""
    assert parallel > 0
    queue = iter(items)

    async def worker() -> None:
        for item in queue:
            await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(parallel, MOST)):
                group.create_task(worker())
    except ExceptionGroup as group_of_errors:
        raise group_of_errors.exceptions[0] from None


@asynccontextmanager
async def resumable(client: Client, done: Callable[[], str]) -> AsyncIterator[None]:
    """Close the client at the end. Raises ValueError where it gave no answer: why, and what is safe (`done`)."""
    try:
        yield
    except NoCompletion as error:
        raise ValueError(f"{error} {done()} The same command goes on from there.") from error
    finally:
        await client.close()
