"""A page on this machine: who gets it, under which headers, and at which port."""

import asyncio
import secrets
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from .access import Access, Refusal

try:  # pages import what they need of it from here, so that what to install is said in one place
    import uvicorn
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect as ClientDisconnect
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ModuleNotFoundError as error:
    raise ValueError(f"The page needs {error.name}: pip install 'rlhf_recipes[label]'.") from error

COOKIE = 10_000_000  # seconds, four months
OPEN_THE_LINK = "Open the link that the server printed: it ends in ?token=..."
HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
LOOPBACK = ("127.0.0.1", "localhost")
HEAD = 65_536  # bytes of a request without its body: browsers send the cookies of all ports
PATIENCE = 20.0  # seconds for a request to come whole
MOST_WAITING = 256  # connections, above which those without a request make room: files may be 1,024


def page_app(routes: Sequence[Route], hosts: Sequence[str] = LOOPBACK) -> Starlette:
    """What answers a page's requests, without a socket. A `Refusal` is answered as JSON, `{"error": words}`.

    Args:
        hosts: names that the server may be called by: a foreign page must not reach it under a name of its own.
    """
    guard = Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    return Starlette(routes=routes, middleware=[guard], exception_handlers={Refusal: _refuse})


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return JSONResponse({"error": str(error)}, error.status, headers=HEADERS)


def browser_of(request: Request, access: Access) -> str:
    """The key of the browser that asks. Raises Refusal where it has not our cookie, or asks too often."""
    browser = access.browser(request.cookies.get(access.name))
    if browser is None:
        raise Refusal(403, OPEN_THE_LINK)
    access.check_rate(browser)
    return browser


def check_admitted(request: Request, access: Access) -> None:
    """Raises Refusal where a browser has neither the link's token nor our cookie, or asks too often.

    Without a cookie it is known by its address, which others may share: of those few open the link at once.
    """
    if access.opens(request.query_params.get("token")) and not access.browser(request.cookies.get(access.name)):
        access.check_rate(f"at {request.client and request.client.host}")
    else:
        browser_of(request, access)


def page_response(request: Request, access: Access, html: str, policy: str) -> Response:
    """A page for a browser that is admitted, with the cookie that admits what the page asks for.

    Args:
        policy: the page's content security policy.
    """
    response = HTMLResponse(html, headers={**HEADERS, "content-security-policy": policy})
    browser = access.browser(request.cookies.get(access.name)) or secrets.token_urlsafe(16)
    response.set_cookie(
        access.name,
        access.cookie(browser),
        max_age=COOKIE,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return response


def event_stream(events: AsyncIterator[str]) -> Response:
    """Server-sent events, each as the protocol writes it, as they come."""
    return StreamingResponse(events, media_type="text/event-stream", headers=HEADERS)


def listening(port: int, share: bool = False) -> socket.socket:
    """An open port, 0 for a free one, of the whole network or of this machine alone. Close it.

    Raises ValueError where that is impossible.
    """
    # Without the protocol named, asyncio leaves Nagle's algorithm on: 40 ms an answer.
    listener = socket.socket(proto=socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("0.0.0.0" if share else "127.0.0.1", port))
        listener.listen()
    except (OSError, OverflowError) as error:
        listener.close()
        raise ValueError(f"--port: cannot listen at {port} ({error}). Try another, or 0 for any.") from error
    return listener


def check_certificate(certificate: Path | None, key: Path | None, share: bool) -> None:
    """Raises ValueError where a page cannot be encrypted by a certificate and its key."""
    if certificate is None and key is None:
        return
    if certificate is None:
        raise ValueError("--key: it is the key of a certificate: --certificate.")
    if not share:
        raise ValueError("--certificate: a page of this machine alone is not encrypted: add --share.")
    for option, file in (("--certificate", certificate), ("--key", key)):
        if file is not None and not file.is_file():
            raise ValueError(f"{option}: there is no file {file}.")
    try:
        # A key with a password is refused here and not asked for it: nobody may be there when the page starts again.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--certificate: {certificate} and {key or 'the key in it'} cannot be used ({error}). What is needed "
            "are PEM files of the certificate, with those that signed it, and of its key without a password."
        ) from error


def link_to(listener: socket.socket, access: Access, share: bool = False, encrypted: bool = False) -> str:
    """The link that opens the page here; of a shared page that for the network is printed, with a warning.

    A page that is encrypted has that for the network alone: its certificate is for this machine's name.
    """
    link = f"{listener.getsockname()[1]}/?token={access.token}"
    if encrypted:
        return f"https://{socket.getfqdn()}:{link}"
    if share:
        print(
            "warning: everybody in this network who has the link can use the page, and as nothing is encrypted "
            "(--certificate) others can read along:\n"
            f"         http://{socket.gethostname()}:{link}",
            file=sys.stderr,
        )
    return f"http://127.0.0.1:{link}"


class _Connection(H11Protocol):
    """A connection that ends where no request comes on it, so that silent ones do not keep out who has the token."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MOST_WAITING:
            for other in list(self.connections):
                if other is not self and isinstance(other, _Connection) and not other.is_answering():
                    other.transport.abort()
        self.patience = self.loop.call_later(PATIENCE, self._look, None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.patience.cancel()
        super().connection_lost(exc)

    def is_answering(self) -> bool:
        """Whether a request has come whole, and its answer has not gone yet."""
        return self.cycle is not None and not (self.cycle.more_body or self.cycle.response_complete)

    def _look(self, before: object) -> None:
        """End it where it waits for the request for which it waited when it was last looked at."""
        if self.cycle is before and not self.is_answering():
            self.transport.abort()
        else:
            self.patience = self.loop.call_later(PATIENCE, self._look, self.cycle)


def server_of(app: Starlette, certificate: Path | None = None, key: Path | None = None) -> uvicorn.Server:
    """The server of a page, which the page's `state.server` is, so that endless answers can end with it."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        lifespan="off",
        timeout_graceful_shutdown=2,
        http=_Connection,
        h11_max_incomplete_event_size=HEAD,
        backlog=MOST_WAITING,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
    app.state.server = uvicorn.Server(config)
    return app.state.server


def serve(app: Starlette, listener: socket.socket, certificate: Path | None = None, key: Path | None = None) -> None:
    """Answer at the port until Ctrl-C, which is raised as KeyboardInterrupt."""
    server_of(app, certificate, key).run(sockets=[listener])
