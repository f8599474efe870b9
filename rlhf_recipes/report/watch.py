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
from .gather import gather, refusing_strange_values
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
LAST = 3.0  # seconds for browsers to fetch the page as it is at the end
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
                    with refusing_strange_values(self.folders):
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

    app = page_app([Route("/", index), Route("/changes", changes)])
    app.state.runs = runs
    return app


def serve_watch_page(folders: Sequence[Path], port: int = 8009) -> None:
    """Serve the page of runs to this machine until Ctrl-C, and print its link.

    Args:
        port: to listen at; 0 takes a free one.
    Raises:
        ValueError: a folder is no run's, or the port cannot be used.
    """
    gather(folders)
    _serve(folders, port, "Ctrl-C ends it; the same command goes on.")


def serve_beside(run_dir: Path) -> None:
    """Serve the page of a run that the parent of this process makes: from its begin until standard input ends."""
    ended = threading.Event()
    threading.Thread(target=lambda: os.read(0, 1) or ended.set(), daemon=True).start()
    while not (run_dir / "recipe.json").is_file():
        if ended.wait(LOOK):
            return
    _serve([run_dir], 0, "The page ends with the run.", ended)


def _serve(folders: Sequence[Path], port: int, note: str, ended: threading.Event | None = None) -> None:
    """Serve the page until Ctrl-C, or until something has ended and its last state was shown."""
    if hasattr(os, "nice"):
        os.nice(19)  # whatever trains on this machine comes first
    access = Access(path=access_file("watch", *folders))
    app = watch_app(folders, access)
    with listening(port) as listener:
        print(f"Open {link_to(listener, access)}\n{note}", flush=True)
        if ended is not None:
            threading.Thread(target=_end_after, args=(ended, app), daemon=True).start()
        with suppress(KeyboardInterrupt):
            serve(app, listener)


def _end_after(ended: threading.Event, app: Starlette) -> None:
    ended.wait()
    app.state.runs.rested = 0.0
    time.sleep(LAST)
    app.state.server.should_exit = True
