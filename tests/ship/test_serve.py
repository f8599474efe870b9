"""Serving: OpenAI's client gets the models' own answers, and what cannot be served is said before an engine starts."""

import json
import shlex
import signal
import socket
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocket
from support.command_line import error_of, failed, start
from support.shipped import make_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_recipes.cli.main import main_cli
from rlhf_recipes.ship.guard import Guard
from rlhf_recipes.ship.serve import Served, command, find_engine, find_served, how_to_ask, serving, warnings


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def served(folder: Path, name: str, format: str = "adapter", kl: float = 0.0, **entries: Any) -> Served:
    """An export that is not there but for what `command` reads of it."""
    (folder / name).mkdir()
    (folder / name / "adapter_config.json").write_text(json.dumps({"r": entries.pop("r", 8), **entries}))
    record = {"format": format, "base_id": entries.get("base", "org/base"), "measured": {"original": {"kl": kl}}}
    return Served(name, folder / name, record)


def words_after(words: list[str], option: str, count: int = 1) -> list[str]:
    place = words.index(option) + 1
    return words[place : place + count]


def test_transformers_serves_runs_and_exports_side_by_side(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    main_cli(["export", str(run), "--to", str(tmp_path / "mine")])
    port = free_port()
    words = [sys.executable, "-m", "rlhf_recipes", "serve", str(run), str(tmp_path / "mine"), "--port", str(port)]
    process = start([*words, "--engine", "transformers"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        lines = [process.stdout.readline() for _ in range(7)]
        assert lines[0] == "Served by transformers; Ctrl-C ends it.\n"
        assert (run / "exports" / "ppo" / "export.json").is_file()
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mine")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "mine")
        messages: list[Any] = [{"role": "user", "content": "w5 w6"}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        with torch.no_grad():
            expected = model.generate(**prompt, do_sample=False, max_new_tokens=5)[0, prompt["input_ids"].shape[1] :]
        for name in ("ppo", "mine"):
            answer = client.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=5)
            said = answer.choices[0].message.content
            assert said == tokenizer.decode(expected, skip_special_tokens=True)
        curl, python = (shlex.split(line) for line in lines[2:4])
        assert lines[1] == "ppo:\n" and curl[0] == "curl" and json.loads(curl[-1])["model"] == "ppo"
        check_guarded(port, tmp_path / "mine")
        printed = subprocess.run([sys.executable, *python[1:]], capture_output=True, text=True)
        assert printed.returncode == 0 and printed.stdout.strip(), printed.stderr
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    with socket.socket() as listener:
        assert listener.connect_ex(("127.0.0.1", port)) != 0, "the engine has ended with it"


def check_guarded(port: int, folder: Path) -> None:
    """Neither a foreign page nor another host's name is answered, and no folder is loaded that was not named."""
    check_own_pages(port)
    for model in (str(folder), "../", [], "org/model"):
        for path in ("/load_model", "/v1/chat/completions"):
            assert status(port, "POST", path, {"model": model, "messages": []}) == 403


def check_own_pages(port: int) -> None:
    ours, evil = f"http://127.0.0.1:{port}", "http://evil.example"
    assert status(port, "GET", "/v1/models", Host="evil.example") == 400
    assert status(port, "GET", "/v1/models", Origin=evil) == 403
    assert status(port, "GET", "/v1/models", Origin=ours) == status(port, "GET", "/v1/models") == 200
    assert status(port, "POST", "/reset", Origin=evil) == status(port, "OPTIONS", "/reset", Origin=evil) == 403
    assert status(port, "POST", "/reset", Content_Type="text/plain") == 403
    assert status(port, "POST", "/reset", Origin=ours) == 200


def status(port: int, method: str, path: str, sent: Any = None, **headers: str) -> int:
    connection = HTTPConnection("127.0.0.1", port)
    all_headers = {"Content-Type": "application/json"} | {key.replace("_", "-"): headers[key] for key in headers}
    connection.request(method, path, sent and json.dumps(sent), all_headers)
    return connection.getresponse().status


VLLM = """#!{python}
# A server that takes its words, and the middleware that they name, as vLLM does.
import argparse, colorsys, importlib, inspect, sys

import uvicorn
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

parser = argparse.ArgumentParser()
for option in ("--served-model-name", "--host"):
    parser.add_argument(option)
parser.add_argument("--port", type=int)
parser.add_argument("--middleware", action="append", default=[])
said, _ = parser.parse_known_args()
routes = [Route(path, lambda request: PlainTextResponse("yes")) for path in ("/health", "/v1/models")]
app = Starlette(routes=[*routes, Route("/reset", lambda request: PlainTextResponse("yes"), methods=["POST"])])
app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])
for middleware in said.middleware:
    module, name = middleware.rsplit(".", 1)
    imported = getattr(importlib.import_module(module), name)
    assert inspect.isclass(imported)
    app.add_middleware(imported)
assert not any(name.partition(".")[0] in ("rlhf_recipes", "transformers") for name in sys.modules)
uvicorn.run(app, host=said.host, port=said.port, log_level="warning")
"""


def test_vllm_gets_the_guard_as_a_middleware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM is not run here: what takes its place imports the middleware as its `build_app` does."""
    model, port = served(tmp_path, "colorsys", "merged"), free_port()
    (model.folder / "__init__.py").write_text("raise SystemExit('the folder of a model is no module')")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "vllm").write_text(VLLM.replace("{python}", sys.executable))
    (tmp_path / "bin" / "vllm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    for places in ("", ":", "."):  # of which a relative one would be the folder of models
        monkeypatch.setenv("PYTHONPATH", places)
        assert find_engine("vllm") == "vllm"
        with serving("vllm", [model], port):
            check_own_pages(port)
    engine = tmp_path / "bin" / "vllm"
    engine.write_text(engine.read_text().replace("in said.middleware", "in ()"))
    with pytest.raises(ValueError, match="answers any web page"), serving("vllm", [model], port):
        pass


def test_the_guard_refuses_foreign_pages_sockets_too() -> None:
    async def talk(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text("yes")

    app = Starlette(routes=[WebSocketRoute("/", talk), Route("/", lambda request: PlainTextResponse("yes"))])
    client = TestClient(Guard(app), base_url="http://localhost:8000")
    own = {"host": "localhost:8000", "origin": "http://localhost:8000"}
    with client.websocket_connect("/", headers=own) as session:
        assert session.receive_text() == "yes"
    for foreign in ({"origin": "http://evil.example"}, {"origin": "null"}, {"host": "evil.example"}):
        with pytest.raises(WebSocketDenialResponse), client.websocket_connect("/", headers=own | foreign):
            pass


def test_the_words_for_vllm(tmp_path: Path) -> None:
    """vLLM is not run here: these are its options as its documentation has them."""
    merged = served(tmp_path, "merged", "merged")
    assert command("vllm", [merged], 8000, ["--max-model-len", "512"]) == [
        *("vllm", "serve", "merged", "--served-model-name", "merged"),
        *("--middleware", "rlhf_recipes_guard.Guard"),
        *("--host", "127.0.0.1", "--port", "8000", "--max-model-len", "512"),
    ]
    sft, ppo = served(tmp_path, "sft"), served(tmp_path, "ppo", r=16, revision="abc")
    words = command("vllm", [ppo, sft], 8001)
    assert words[:4] == ["vllm", "serve", "org/base", "--revision=abc"]
    assert words_after(words, "--lora-modules", 2) == ["ppo=ppo", "sft=sft"]
    assert "--max-lora-rank=16" in words and words_after(words, "--max-loras") == ["2"]
    assert words_after(words, "--tokenizer") == words_after(words, "--generation-config") == ["ppo"]
    assert words_after(words, "--host") == ["127.0.0.1"]
    assert words_after(words, "--middleware") == ["rlhf_recipes_guard.Guard"]


def test_what_an_export_says_becomes_no_option_of_vllm(tmp_path: Path) -> None:
    theirs = served(tmp_path, "theirs", base="--tool-parser-plugin=theirs/evil.py")
    with pytest.raises(ValueError, match=r"theirs/export\.json: base_id: Repo id must use"):
        command("vllm", [theirs], 8000)
    words = command("vllm", [served(tmp_path, "odd", revision="--trust-remote-code", r="--trust-remote-code")], 8000)
    assert "--trust-remote-code" not in words


def test_what_is_known_to_be_off_is_said(tmp_path: Path) -> None:
    models = [served(tmp_path, "near", kl=0.01), served(tmp_path, "far", kl=0.3)]
    (said,) = warnings("vllm", models)
    assert said.startswith("far:") and "0.3 nats" in said
    assert not list(warnings("transformers", models))


def test_a_name_cannot_leave_its_quotes() -> None:
    odd = """a 'quoted" $(name)"""
    said = how_to_ask([Served(odd, Path("nowhere"), {})], 8000)
    _, curl, python = said.splitlines()
    assert json.loads(shlex.split(curl)[-1]) == {"model": odd, "prompt": "Once upon a time"}
    compile(shlex.split(python)[-1], "printed", "exec")
    assert json.dumps(odd) in shlex.split(python)[-1]


def test_what_cannot_be_served_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sft, ppo, merged = (served(tmp_path, *words) for words in (("sft",), ("ppo",), ("merged", "merged")))
    with pytest.raises(ValueError, match="transformers serves no adapter"):
        command("transformers", [sft], 8000)
    with pytest.raises(ValueError, match="one merged model, or adapters of one base"):
        command("vllm", [sft, merged], 8000)
    with pytest.raises(ValueError, match="one merged model, or adapters of one base"):
        command("vllm", [merged, Served("other", merged.folder, merged.record)], 8000)
    with pytest.raises(ValueError, match="one merged model, or adapters of one base"):
        command("vllm", [sft, Served("other", ppo.folder, {**ppo.record, "base_id": "org/other"})], 8000)
    with pytest.raises(ValueError, match=r"Two models have one name \(sft, sft\)"):
        command("vllm", [sft, sft], 8000)
    for name, format, said in (("file", "gguf", "llama-server"), ("scores", "reward", "is a reward model")):
        folder = served(tmp_path, name, format).folder
        (folder / "export.json").write_text(json.dumps({"format": format}))
        with pytest.raises(ValueError, match=said):
            find_served(folder)
    with pytest.raises(ValueError, match="--models is for a run folder"):
        find_served(tmp_path / "file", ["sft"])
    assert "is no run folder" in failed(capsys, ["serve", str(tmp_path), "--engine", "transformers"])
    assert "--port must be at most 65535" in error_of(capsys, ["serve", str(tmp_path), "--port", "70000"])
    assert "--engine vllm is not installed: pip install" in failed(capsys, ["serve", str(tmp_path), "--engine", "vllm"])


def test_a_run_that_was_trained_on_is_not_served_from_an_old_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)
    main_cli(["export", str(run), "--to", str(run / "exports" / "ppo")])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        words = ["serve", str(run), "--engine", "transformers", "--port", str(listener.getsockname()[1])]
        assert "choose another --port" in failed(capsys, words), "the export is used as it is"
        weights = run / "ppo" / "policy" / "adapter_model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        assert f"is not of the ppo that {run} holds now: delete it" in failed(capsys, words)


def test_an_engine_that_ends_at_once_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    main_cli(["export", str(run), "--to", str(tmp_path / "mine")])
    words = ["serve", str(tmp_path / "mine"), "--engine", "transformers", "--port", str(free_port())]
    assert "The engine ended with code 2" in failed(capfd, [*words, "--engine-options=--no-such-option"])
