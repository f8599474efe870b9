"""`transformers serve` for this machine alone, which it does not see to itself: run as a file, with its words.

It would answer under any host's name and what any web page sends (`POST /reset`), and load any folder that is named as
a model. Here a model is one of the links in the folder that it is started in. Not of the package: it may import nothing
of it, since the folder that it is started in is not the package's.
"""

import json
import re
from pathlib import Path
from typing import Any

import uvicorn
from starlette.datastructures import Headers
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from transformers.cli.transformers import main

HOSTS = ["127.0.0.1", "localhost"]
OWN = r"https?://(127\.0\.0\.1|localhost)(:\d+)?"  # pages of this machine


class Guard:
    """An ASGI application before another, which gets requests of no foreign page, for models of these names alone."""

    def __init__(self, app: Any, names: set[str]) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer with a refusal, or hand the request on, its body read."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        body = await Request(scope, receive).body()
        refusal = self._refusal(scope["method"], Headers(scope=scope), body)
        if refusal is not None:
            return await JSONResponse({"error": {"message": refusal}}, 403)(scope, receive, send)
        read = [{"type": "http.request", "body": body}]

        async def receive_again() -> Any:
            return read.pop() if read else await receive()

        return await self.app(scope, receive_again, send)

    def _refusal(self, method: str, headers: Headers, body: bytes) -> str | None:
        """Why a request is not answered, if it is not."""
        if "origin" in headers and not re.fullmatch(OWN, headers["origin"]):
            return "The request comes from another page."
        if method != "POST":
            return None
        if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return "A request must be of the type application/json."
        try:
            sent = json.loads(body or b"{}")
        except (ValueError, RecursionError):
            return "The request is not JSON."
        if not isinstance(sent, dict) or sent.get("model") not in [None, *self.names]:
            return f"The models are {', '.join(sorted(self.names))}."
        return None


class GuardedConfig(uvicorn.Config):
    """A server's settings, of an application behind a guard."""

    def __init__(self, app: Any, **settings: Any) -> None:
        names = {path.name for path in Path().iterdir() if path.is_symlink()}
        super().__init__(TrustedHostMiddleware(Guard(app, names), HOSTS, www_redirect=False), **settings)


if __name__ == "__main__":
    # The application is made inside `transformers serve`, which hands it to this class and to nothing that can be set.
    uvicorn.Config = GuardedConfig  # type: ignore[misc]
    main()
