"""The report of runs as a page that grows with them: drawn again when the files of the run folders have changed.

A run knows nothing of it: it may be on another machine, and finished.
"""

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..records.digest import digest
from ..records.files import RowsReader
from .access import Access, Refusal, access_file
from .gather import gather
from .page import render
from .server import (
    Request,
    Response,
    Route,
    Starlette,
    browser_of,
    check_admitted,
    event_stream,
    link_to,
    listening,
    page_app,
    page_response,
    serve,
)

LOOK = 1.0  # seconds between two looks at the files
REST = 10  # times as long as the page took to draw nothing is drawn: a run beside it needs the processor
WATCHED = (
    "recipe.json",
    "manifest.json",
    "progress.json",
    "metrics.jsonl",
    "samples.jsonl",
    "evaluation.json",
    "answers.jsonl",
)
POLICY = "frame-ancestors 'none'"  # the rest stands in the page itself


class Drawn(NamedTuple):
    """A page, and what tells it from an earlier one."""

    html: str
    version: str


class WatchedRuns:
    """The page of some runs, which is drawn again where their files have changed."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders
        self.read = RowsReader()
        self.lock = threading.Lock()  # one draws at a time
        self.seen: object = None  # the state of the files that was drawn
        self.rested = 0.0  # when it may be drawn again, on the monotonic clock
        self.page = Drawn("", "")
        self.problem: str | None = None

    def drawn(self) -> Drawn:
        """The page of what the files hold now or, where it was drawn a moment ago, of what they held then.

        Raises ValueError where the files cannot be shown.
        """
        with self.lock:
            state = list(self._state())
            if state != self.seen and time.monotonic() >= self.rested:
                start, self.seen, self.problem = time.monotonic(), state, None
                try:
                    html = render(gather(self.folders, self.read), grows=True)
                    self.page = Drawn(html, digest(html))
                except ValueError as error:
                    self.problem = str(error)
                self.rested = time.monotonic() + REST * (time.monotonic() - start)
            if self.problem is not None:
                raise ValueError(self.problem)
            return self.page

    def _state(self) -> Iterator[tuple[Path, int, int]]:
        """Each file of the runs, their rounds, their variants and those's rounds, with its size and its time."""
        for folder in self.folders:
            for inside in ("", "*/", "*/*/"):
                for path in (path for name in WATCHED for path in folder.glob(inside + name)):
                    try:
                        found = path.stat()
                    except FileNotFoundError:  # it is being replaced
                        continue
                    yield path, found.st_size, found.st_mtime_ns


def watch_app(folders: Sequence[Path], access: Access) -> Starlette:
    """The page, and a stream of server-sent events that says when there is another one. Its server is `serve`'s.

    `/?token=...` gives the page and a cookie, without which nothing else is answered.
    """
    runs = WatchedRuns(folders)

    async def index(request: Request) -> Response:
        check_admitted(request, access)
        try:
            page = await asyncio.to_thread(runs.drawn)
        except ValueError as error:
            raise Refusal(503, str(error)) from error
        return page_response(request, access, page.html, POLICY)

    async def changes(request: Request) -> Response:
        browser_of(request, access)
        return event_stream(events(request.app))

    async def events(app: Starlette) -> AsyncIterator[str]:
        """An event where the page has changed, with its version, or cannot be drawn, with the reason."""
        said = ""
        while not app.state.server.should_exit:
            try:
                event = f"data: {(await asyncio.to_thread(runs.drawn)).version}\n\n"
            except ValueError as error:
                event = f"event: problem\ndata: {' '.join(str(error).split())}\n\n"
            yield event if event != said else ":\n\n"  # a remark finds out whether somebody still listens
            said = event
            await asyncio.sleep(LOOK)

    return page_app([Route("/", index), Route("/changes", changes)])


def serve_watch_page(folders: Sequence[Path], port: int = 8009) -> None:
    """Serve the page of runs to this machine until Ctrl-C, and print its link.

    Args:
        port: to listen at; 0 takes a free one.
    Raises:
        ValueError: a folder is no run's, or the port cannot be used.
    """
    gather(folders)
    if hasattr(os, "nice"):
        os.nice(19)  # whatever trains on this machine comes first
    access = Access(path=access_file("watch", *folders))
    with listening(port) as listener:
        print(f"Open {link_to(listener, access)}\nCtrl-C ends it; the same command goes on.", flush=True)
        with suppress(KeyboardInterrupt):
            serve(watch_app(folders, access), listener)
