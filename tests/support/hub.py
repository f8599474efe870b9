"""A stand-in for the Hugging Face Hub on loopback: what its client asks for when it uploads folders, and no more."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils.sha import git_hash

TOKEN = "hf_of_the_test"
LARGE = (".safetensors",)  # files that go to the large file storage


@dataclass
class Repo:
    """A repository: what is in it now."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0


@dataclass
class Hub:
    """The server's state, and what it has seen."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)  # `models/ORG/NAME` and `datasets/ORG/NAME`
    stored: dict[str, bytes] = field(default_factory=dict)  # large files by their sha256
    requests: list[str] = field(default_factory=list)  # `PUT /lfs/...`
    user: dict[str, Any] = field(
        default_factory=lambda: {
            "name": "me",
            "orgs": [{"name": "org"}],
            "auth": {"accessToken": {"role": "write"}},
        }
    )
    refuses: Callable[[str], bool] = lambda request: False  # which requests it refuses, with 403

    def puts(self) -> list[str]:
        return [request for request in self.requests if request.startswith("PUT")]


class _Refused(Exception):
    """An error of the Hub's: its status, its code, its words, and what else is in its body."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        path, hub = self.path.partition("?")[0], self.hub
        hub.requests.append(f"{self.command} {path}")
        try:
            if hub.refuses(hub.requests[-1]):
                raise _Refused(403, "", "Private storage limit reached.")
            if not path.startswith("/lfs/") and self.headers.get("authorization") != f"Bearer {TOKEN}":
                raise _Refused(401, "", "Invalid username or password.")
            for pattern, act in ROUTES.items():
                if match := re.fullmatch(pattern, f"{self.command} {path}"):
                    return self.reply(200, act(hub, body, *match.groups()))
            raise _Refused(404, "", f"no {path}")
        except _Refused as refused:
            status, code, words, *more = refused.args
            self.reply(status, {"error": words, **dict(more)}, code)

    do_GET = do_POST = do_PUT = answer

    def reply(self, status: int, value: Any, code: str = "") -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(data)


def _repo(hub: Hub, place: str) -> Repo:
    if place not in hub.repos:
        raise _Refused(404, "RepoNotFound", "Repository not found")
    return hub.repos[place]


def _oid(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if path.endswith(LARGE) else git_hash(data)


def _create(hub: Hub, body: bytes) -> Any:
    asked = json.loads(body)
    kind, name = asked.get("type", "model"), f"{asked['organization']}/{asked['name']}"
    url = f"{hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
    if f"{kind}s/{name}" in hub.repos:
        raise _Refused(409, "", "You already created this repo", ("url", url))
    hub.repos[f"{kind}s/{name}"] = Repo(asked["visibility"] == "private")
    return {"url": url}


def _info(hub: Hub, body: bytes, place: str) -> Any:
    repo = _repo(hub, place)
    files = [{"rfilename": path} for path in repo.files]
    name = place.partition("/")[2]
    return {"id": name, "private": repo.private, "sha": "0" * 40, "siblings": files, "tags": [], "downloads": 0}


def _tree(hub: Hub, body: bytes, place: str) -> Any:
    files = _repo(hub, place).files
    return [{"type": "file", "path": path, "size": len(data), "oid": git_hash(data)} for path, data in files.items()]


def _preupload(hub: Hub, body: bytes, place: str) -> Any:
    repo, answers = _repo(hub, place), []
    for file in json.loads(body)["files"]:
        path = file["path"]
        mode = "lfs" if path.endswith(LARGE) else "regular"
        known = {"oid": _oid(path, repo.files[path])} if path in repo.files else {}
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
    return {"files": answers}


def _batch(hub: Hub, body: bytes, name: str) -> Any:
    objects = json.loads(body)["objects"]
    for each in objects:
        if each["oid"] not in hub.stored:
            each["actions"] = {"upload": {"href": f"{hub.url}/lfs/{each['oid']}"}}
    return {"transfer": "basic", "objects": objects}


def _store(hub: Hub, body: bytes, oid: str) -> Any:
    assert hashlib.sha256(body).hexdigest() == oid
    hub.stored[oid] = body
    return {}


def _commit(hub: Hub, body: bytes, place: str) -> Any:
    repo = _repo(hub, place)
    for line in map(json.loads, body.splitlines()):
        value = line["value"]
        if line["key"] == "file":
            repo.files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            repo.files[value["path"]] = hub.stored[value["oid"]]
        elif line["key"] == "deletedFile":
            del repo.files[value["path"]]
    repo.commits += 1
    name = place.removeprefix("models/")
    return {"commitUrl": f"{hub.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}


PLACE = r"((?:model|dataset)s/[\w.-]+/[\w.-]+)"
ROUTES: dict[str, Callable[..., Any]] = {
    "GET /api/whoami-v2": lambda hub, body: hub.user,
    "POST /api/repos/create": _create,
    "POST /api/validate-yaml": lambda hub, body: {},
    rf"GET /api/{PLACE}(?:/revision/main)?": _info,
    rf"GET /api/{PLACE}/tree/main": _tree,
    rf"POST /api/{PLACE}/preupload/main": _preupload,
    rf"POST /api/{PLACE}/commit/main": _commit,
    r"POST /([\w./-]+)\.git/info/lfs/objects/batch": _batch,
    r"PUT /lfs/(\w+)": _store,
}


@contextmanager
def hub_stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub for this process, with a token that may write to `me` and `org`, and without Xet, its other storage."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    for name, value in {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
