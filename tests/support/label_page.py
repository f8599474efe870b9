"""The label page in a browser, and its server in a thread."""

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from playwright.sync_api import Page, expect
from starlette.applications import Starlette

from rlhf_recipes.feedback.label import label_app
from rlhf_recipes.report.access import Access

TOKEN = "a-token"


@contextmanager
def serving(samples: Path, labels: Path | None = None, **options: Any) -> Iterator[str]:
    """The page on a port of this process; labels go beside the samples unless they are named. Gives its link."""
    app = label_app(samples, labels or samples.with_name("labels.jsonl"), access=Access(TOKEN), **options)
    with answering(app) as link:
        yield link


@contextmanager
def answering(app: Starlette) -> Iterator[str]:
    """A page's server on a port of this process. Gives the link."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/?token={TOKEN}"
        finally:
            server.should_exit = True
            thread.join()


def press(page: Page, keys: str) -> None:
    for key in keys.split():
        page.keyboard.press(key)


def done(page: Page, count: int, total: int | None = None) -> None:
    expect(page.locator("#count")).to_have_text(re.compile(f"^{count} of {total or ''}"))


def shown(page: Page) -> list[str]:
    return page.locator(".card > .text").all_text_contents()
