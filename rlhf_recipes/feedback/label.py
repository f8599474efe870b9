"""A local page on which people rank samples: one prompt, its responses in a shuffled order, their origin hidden.

A share of the samples goes to every labeler, so that their agreement can be measured; of the others each goes to one.
Every judgement is on disk before the next sample is sent. What has been judged is read back from the files of labels
and of skips when the server starts, so that killing it loses nothing.
"""

import asyncio
import json
import re
import secrets
import unicodedata
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from ..records.digest import digest
from ..records.files import writing_in
from ..records.lock import held
from ..report.access import Access, Refusal, access_file
from ..report.server import (
    HEADERS,
    LOOPBACK,
    ClientDisconnect,
    JSONResponse,
    Request,
    Response,
    Route,
    Starlette,
    StreamingResponse,
    browser_of,
    check_admitted,
    check_certificate,
    link_to,
    listening,
    page_app,
    page_response,
    serve,
)
from .board import NOTE, Board, Mode
from .live import Answerer, ask
from .rows import Row, labels_beside, read_samples
from .sheet import read_sheet, sheet_to_show

BODY = 65_536  # bytes of a request at most
NAME = r"[\w. -]{1,40}"
NAMES = 20  # of labelers who share a browser, at most

# Nothing may be loaded, and no script may run but the page's own; a string can become neither markup nor a script.
POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'"
)


def label_app(
    samples: Path,
    labels: Path,
    *,
    access: Access,
    guidelines: str = "",
    sheet: Path | None = None,
    mode: Mode = "rank",
    overlap: float = 0.2,
    seed: int = 0,
    answer: Answerer | None = None,
    hosts: Sequence[str] = LOOPBACK,
) -> Starlette:
    """The page and what it asks for, without a socket; its `state.board` is the `Board`.

    `/?token=...` gives the page and a cookie, without which nothing else is answered. For one process: `Board` says
    why. A judgement is flushed and synced to disk on the event loop, which takes milliseconds.

    Args:
        samples: the file of samples.
        labels: the file of labels.
        access: who is let in.
        guidelines: text to be shown beside the samples.
        sheet: a file of questions about each response (default: none).
        mode: rank all responses at once, or compare them pair by pair.
        overlap: share of the samples that every labeler gets, 0 to 1.
        seed: of that share, and of all orders.
        answer: has prompts answered that people type (default: none can be typed).
        hosts: names that the server may be called by: a foreign page must not reach it under a name of its own.
    Raises:
        ValueError: a file cannot be used.
    """
    if not 0 <= overlap <= 1:
        raise ValueError(f"--overlap must be between 0 and 1, not {overlap}.")
    if labels.resolve() == samples.resolve():
        raise ValueError(f"{labels} holds the samples: labels need a file of their own (--labels).")
    questions = () if sheet is None else read_sheet(sheet)
    waiting = answer is None or (samples.is_file() and samples.stat().st_size > 0)  # else all are still to be typed
    board = Board(read_samples(samples) if waiting else [], labels, overlap, seed, questions)
    if not board.samples and answer is None:
        raise ValueError(f"{samples}: the responses to each prompt are all the same, so there is nothing to rank.")
    settings = {"mode": mode, "guidelines": guidelines, "note": NOTE, "sheet": sheet_to_show(questions)}
    page = _LabelPage(board, access, settings | {"live": answer is not None}, answer)
    app = page_app([Route("/", page.index), Route("/{action}", page.act, methods=["POST"])], hosts)
    app.state.board = board
    return app


class _LabelPage:
    """What answers the browser: the page itself, and what it sends.

    Args:
        settings: what the page is told when it starts.
        answer: see `label_app`.
    """

    def __init__(self, board: Board, access: Access, settings: dict[str, Any], answer: Answerer | None) -> None:
        self.board, self.access, self.settings, self.answer = board, access, settings, answer
        self.actions = {"start": board.stay, "stay": board.stay, "judge": board.rank}
        self.actions |= {"skip": board.skip, "undo": board.undo}
        self.names: dict[str, set[str]] = defaultdict(set)  # browser -> names that were given in it
        self.turn, self.asking = asyncio.Lock(), set[str]()  # to be answered; browsers that wait for it
        self.html = Path(__file__).with_name("label.html").read_text(encoding="utf-8")
        for name in ("pages.css", "pages.js"):
            part = (Path(__file__).parents[1] / "report" / name).read_text(encoding="utf-8")
            self.html = self.html.replace(f"{{{name}}}", part)

    async def index(self, request: Request) -> Response:
        """The page, for who has the token; the cookie that it sets admits what the page sends."""
        check_admitted(request, self.access)
        nonce = secrets.token_urlsafe(16)
        return page_response(request, self.access, self.html.replace("{nonce}", nonce), POLICY.format(nonce=nonce))

    async def act(self, request: Request) -> Response:
        """Do what a labeler asked for, and say what he has before him then.

        Raises Refusal, also where the disk has no room for it or the file of labels was deleted.
        """
        browser = browser_of(request, self.access)
        sent = await _sent_json(request)
        labeler = self._labeler(browser, sent)
        sent["browser"] = digest(browser)
        action = request.path_params["action"]
        if action == "ask" and self.answer is not None:
            prompt = _prompt(sent.get("prompt"))
            return StreamingResponse(
                self._ask(browser, labeler, prompt, self.answer), media_type="application/x-ndjson", headers=HEADERS
            )
        if action not in self.actions:
            raise Refusal(404, "There is no such page.")
        try:
            with writing_in(self.board.labels.path):
                self.actions[action](labeler, sent)
        except ValueError as error:  # nothing of it is written
            raise Refusal(507, str(error)) from error
        settings = self.settings if action == "start" else {}
        return JSONResponse(settings | self.board.state(labeler), headers=HEADERS)

    def _labeler(self, browser: str, sent: Row) -> str:
        """Who is at a browser. Raises Refusal where that is no name, or one too many."""
        labeler, names = _name(sent.get("labeler")), self.names[browser]
        if len(names | {labeler}) > NAMES:
            raise Refusal(429, f"{NAMES} people have given their names in this browser: take another one.")
        names.add(labeler)
        return labeler

    async def _ask(self, browser: str, labeler: str, prompt: str, answer: Answerer) -> AsyncIterator[str]:
        """The lines of `live.ask`, one prompt of a browser at a time."""
        if browser in self.asking:
            yield json.dumps({"error": "Your last prompt is still being answered."})
            return
        self.asking.add(browser)
        try:
            async for line in ask(self.board, labeler, prompt, answer, self.turn):
                yield line
        finally:
            self.asking.remove(browser)


async def _sent_json(request: Request) -> Row:
    """The JSON object that one of our own pages sent. Raises Refusal for anything else."""
    headers = request.headers
    if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise Refusal(415, "The request must be of the type application/json.")
    if headers.get("origin", "").partition("://")[2] != headers.get("host"):
        raise Refusal(403, "The request comes from another page.")
    if int(headers.get("content-length", BODY + 1)) > BODY:
        raise Refusal(413, f"The request must be of a known length, at most {BODY:,} bytes.")
    try:
        sent = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "The request is not JSON.") from error
    except ClientDisconnect as error:  # nobody hears this
        raise Refusal(400, "The request was broken off.") from error
    if not isinstance(sent, dict):
        raise Refusal(400, "The request is no JSON object.")
    return sent


def _name(given: Any) -> str:
    """A labeler's name, in Unicode's composed form. Raises Refusal where it is none."""
    name = unicodedata.normalize("NFC", given).strip() if isinstance(given, str) else ""
    if not re.fullmatch(NAME, name):
        raise Refusal(422, "A name has 1 to 40 letters, digits, spaces and . _ - in it.")
    return name


def _prompt(given: Any) -> str:
    """A prompt that somebody has typed. Raises Refusal where it is none."""
    if not isinstance(given, str) or not given.strip():
        raise Refusal(422, "prompt: there must be text in it.")
    return given.strip().encode(errors="replace").decode()  # half of a surrogate pair is no text


def serve_label_page(
    samples: Path,
    labels: Path | None = None,
    *,
    guidelines: Path | None = None,
    sheet: Path | None = None,
    mode: Mode = "rank",
    overlap: float = 0.2,
    seed: int = 0,
    answer: Answerer | None = None,
    port: int = 8008,
    share: bool = False,
    certificate: Path | None = None,
    key: Path | None = None,
) -> None:
    """Serve the page until Ctrl-C, and print its link, and at the end how much was judged.

    A file that was deleted meanwhile is then written again, from memory.

    Args:
        samples: the file of samples.
        labels: the file of labels; None: beside the samples, with the suffix .labels.jsonl.
        guidelines: a file of text to be shown beside the samples.
        sheet: see `label_app`.
        mode: see `label_app`.
        overlap: see `label_app`.
        seed: see `label_app`.
        answer: see `label_app`.
        port: to listen at; 0 takes a free one.
        share: listen to the whole network and not to this machine alone.
        certificate: a PEM file, which encrypts a shared page (default: it is not encrypted).
        key: the PEM file of its key (default: that is in the certificate's).
    Raises:
        ValueError: a file, the certificate or the port cannot be used.
    """
    labels = labels or labels_beside(samples)
    check_certificate(certificate, key, share)
    if guidelines is not None and not guidelines.is_file():
        raise ValueError(f"--guidelines: there is no file {guidelines}.")
    text = guidelines.read_text(encoding="utf-8", errors="replace") if guidelines is not None else ""
    with held(labels):
        access = Access(path=access_file("label", labels))
        shown = {"guidelines": text, "sheet": sheet, "mode": mode, "overlap": overlap, "seed": seed, "answer": answer}
        app = label_app(samples, labels, access=access, hosts=("*",) if share else LOOPBACK, **shown)
        board: Board = app.state.board
        before = len(board.labels.rows)
        with listening(port, share) as listener:
            _print_welcome(board, link_to(listener, access, share, certificate is not None))
            try:
                serve(app, listener, certificate, key)
            except KeyboardInterrupt:
                for journal in (board.labels, board.skips):
                    journal.restore()
                now = len(board.labels.rows)
                print(f"\n{now - before:,} judgements, {now:,} in all in {labels}")


def _print_welcome(board: Board, link: str) -> None:
    """Print what there is to judge and where."""
    done = len(board.labels.rows)
    print(f"{len(board.samples):,} samples, {len(board.shared):,} of them for everybody; {done:,} labels so far.")
    if board.left_out:
        print(f"{board.left_out:,} are left out, because their responses are all the same.")
    print(f"Open {link}\nCtrl-C ends it; the same command goes on.", flush=True)
