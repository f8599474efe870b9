"""Models that answer: an endpoint that does what a test tells it, failures too; a tiny judge; `transformers serve`."""

import asyncio
import math
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch
import uvicorn
from safetensors.torch import load_file, save_file
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from support.tiny_models import VOCABULARY, save_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rlhf_recipes.data.tokens import set_chat_template

Body = dict[str, Any]
Reply = Callable[[Body, int], Any]  # of a request's body and its number, from 1: a text, a JSON value, or a Response


class Endpoint:
    """The server, as a context: `url`, and what it has seen (`bodies`, `keys`, `most` requests at once, `listed`)."""

    def __init__(self, reply: Reply, seconds: float = 0.0) -> None:
        self.reply, self.seconds = reply, seconds
        self.bodies: list[Body] = []
        self.keys: set[str | None] = set()
        self.now = self.most = self.listed = 0
        routes = [Route("/v1/models", self.models), Route("/v1/chat/completions", self.chat, methods=["POST"])]
        config = uvicorn.Config(Starlette(routes=routes), port=0, log_level="critical", timeout_graceful_shutdown=0)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    async def models(self, request: Request) -> Response:
        self.listed += 1
        return JSONResponse({"object": "list", "data": [{"id": "scripted", "object": "model"}]})

    async def chat(self, request: Request) -> Response:
        self.keys.add(request.headers.get("authorization"))
        body = await request.json()
        self.bodies.append(body)
        number = len(self.bodies)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(self.seconds)
            reply = self.reply(body, number)
            if asyncio.iscoroutine(reply):
                reply = await reply
        finally:
            self.now -= 1
        if isinstance(reply, str):
            reply = completion(reply)
        return reply if isinstance(reply, Response) else JSONResponse(reply)

    def die(self) -> None:
        """Close the socket and every connection at once, as a killed server does. For replies, in the server's loop."""
        for listening in self.server.servers:
            listening.close()
        for connection in list(self.server.server_state.connections):
            connection.transport.abort()  # type: ignore[union-attr]

    def die_at(self, number: int) -> "Endpoint":
        """Die when the request of this number comes, which gets no answer any more."""
        reply = self.reply

        def last(body: Body, count: int) -> Any:
            if count == number:
                self.die()
            return reply(body, count)

        self.reply = last
        return self

    def __enter__(self) -> "Endpoint":
        self.thread.start()
        while not self.server.started:
            self.thread.join(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.force_exit = self.server.should_exit = True
        self.thread.join()


def completion(text: str | None, likely: list[Mapping[str, float]] | None = None, reason: str = "stop") -> Body:
    """A chat completion of 7 + 3 tokens.

    Args:
        likely: of each token of the text, in their order, the likeliest tokens with their probabilities, its own first.
    """
    choice: Body = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}}
    if likely is not None:
        tokens = [
            [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in place.items()] for place in likely
        ]
        choice["logprobs"] = {"content": [{**place[0], "top_logprobs": place} for place in tokens]}
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    names = {"id": "1", "object": "chat.completion", "created": 0, "model": "scripted"}
    return {**names, "choices": [choice], "usage": usage}


def error(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error as OpenAI's API words it."""
    return JSONResponse({"error": {"message": message, "type": "error"}}, status, headers)


def answers(body: Body) -> tuple[str, str]:
    """The two answers that a judge is asked to compare with the shipped template."""
    found = re.search(
        r"=== (\w{8}) answer A\n(.*)\n=== \1 answer B\n(.*)\n=== \1 end\n", body["messages"][0]["content"], re.DOTALL
    )
    assert found, body["messages"]
    return found[2], found[3]


def longer(body: Body, number: int = 0) -> str:
    """A judge that prefers the longer answer, and the first of two as long."""
    first, second = answers(body)
    return "A" if len(first) >= len(second) else "B"


def save_judge(folder: Path) -> Path:
    """Write a tiny random model whose likeliest token is always A or B, by what it is asked."""
    save_model(folder, seed=1)
    words = ["<pad>", "<bos>", "<eos>", "<unk>", "A", "B", *(f"w{i}" for i in range(6, VOCABULARY))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    set_chat_template(tokenizer, None)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[5] = -head[4]  # one of the two logits is above 0, the logit of all others
        head[:4] = head[6:] = 0.0
    model.generation_config.do_sample = True  # `transformers serve` heeds a temperature above 0 only then
    model.save_pretrained(folder)
    return folder


def change_weights(folder: Path) -> None:
    """Change the weights of a saved model or adapter, and nothing else in its folder."""
    (path,) = folder.glob("*.safetensors")
    save_file({name: 1.5 * weight for name, weight in load_file(path).items()}, path, {"format": "pt"})


@contextmanager
def serve(model: Path) -> Iterator[str]:
    """The URL of a real `transformers serve` of a model, on loopback."""
    command = shutil.which("transformers", path=Path(sys.executable).parent)
    if command is None:
        pytest.skip("transformers serve is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [command, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = model.with_suffix(".log")
    with log.open("w") as stream, subprocess.Popen(words, stdout=stream, stderr=stream) as server:
        try:
            while not _is_up(f"http://127.0.0.1:{port}/health"):
                assert server.poll() is None, log.read_text()
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()


def _is_up(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=1).status == 200
    except OSError:
        return False
