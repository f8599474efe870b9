"""An engine's server for this machine alone, which engines do not see to themselves.

They would answer under any host's name and what any web page sends (`POST /reset`). vLLM imports this file, by the name
of a link to it, for its `--middleware`. `transformers serve` has no such option and would load any folder that is named
as a model: it is run by this file, with its words, and a model is one of the links in the folder that it is started in.

Not of the package: it may import nothing of it, since neither folder is the package's, nor vLLM's Python perhaps ours.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import uvicorn
from starlette.datastructures import Headers
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse

HOSTS = ["127.0.0.1", "localhost"]
OWN = r"https?://(127\.0\.0\.1|localhost)(:\d+)?"  # pages of this machine


class Guard:
    """An ASGI application before another, which gets requests of this machine's names and pages alone, in JSON."""

    def __init__(self, app: Any, names: Collection[str] | None = None) -> None:
        """
        Args:
            names: of the only models that may be asked for; None: the application loads no others, as vLLM.
        """
        self.app, self.names = TrustedHostMiddleware(app, HOSTS, www_redirect=False), names

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer with a refusal, or hand the request on, its body read where names are to be found in it."""
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        refusal = _refusal(scope.get("method"), Headers(scope=scope))
        if refusal is None and self.names is not None and scope["type"] == "http":
            body = await Request(scope, receive).body()
            refusal, receive = self._other_model(scope["method"], body), _again(body, receive)
        if refusal is not None:
            return await JSONResponse({"error": {"message": refusal}}, 403)(scope, receive, send)
        return await self.app(scope, receive, send)

    def _other_model(self, method: str, body: bytes) -> str | None:
        """Why a request of this body is not answered, if it is not."""
        assert self.names is not None
        if method != "POST":
            return None
        try:
            sent = json.loads(body or b"{}")
        except (ValueError, RecursionError):
            return "The request is not JSON."
        if not isinstance(sent, dict) or sent.get("model") not in [None, *self.names]:
            return f"The models are {', '.join(sorted(self.names))}."
        return None


def _refusal(method: str | None, headers: Headers) -> str | None:
    """Why a request of these headers is not answered, if it is not."""
    if "origin" in headers and not re.fullmatch(OWN, headers["origin"]):
        return "The request comes from another page."
    if method == "POST" and headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        return "A request must be of the type application/json."
    return None


def _again(body: bytes, receive: Any) -> Any:
    """What receives a body that has been read, and then what `receive` does."""
    read = [{"type": "http.request", "body": body}]

    async def receive_again() -> Any:
        return read.pop() if read else await receive()

    return receive_again


class GuardedConfig(uvicorn.Config):
    """A server's settings, of an application behind a guard."""

    def __init__(self, app: Any, **settings: Any) -> None:
        super().__init__(Guard(app, {path.name for path in Path().iterdir() if path.is_symlink()}), **settings)


if __name__ == "__main__":
    from transformers.cli.transformers import main  # which vLLM's Python may not have

    # The application is made inside `transformers serve`, which hands it to this class and to nothing that can be set.
    uvicorn.Config = GuardedConfig  # type: ignore[misc]
    main()
