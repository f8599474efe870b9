"""Pages of this machine in a browser, and their server in a thread."""

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, expect
from starlette.applications import Starlette

from rlhf_recipes.feedback.label import label_app
from rlhf_recipes.report.access import Access
from rlhf_recipes.report.server import server_of

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
    server = server_of(app)
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


class Client:
    """Requests as a browser sends them, but for what is changed."""

    def __init__(self, link: str, token: str = TOKEN) -> None:
        self.host = link.split("/")[2]
        status, headers, self.page = self("GET", f"/?token={token}")
        assert status == 200
        self.headers, self.cookie = headers, headers["set-cookie"].partition(";")[0]

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], str]:
        connection = HTTPConnection(self.host)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        found = {key.lower(): value for key, value in response.getheaders()}
        return response.status, found, response.read().decode()

    def post(self, path: str, said: Any, **headers: str) -> tuple[int, Any]:
        usual = {"Content-Type": "application/json", "Origin": f"http://{self.host}", "Cookie": self.cookie}
        body = said if isinstance(said, str) else json.dumps(said)
        usual |= {name.replace("_", "-"): value for name, value in headers.items()}
        status, _, text = self("POST", path, body, **{name: value for name, value in usual.items() if value})
        return status, json.loads(text) if text.startswith("{") else text
