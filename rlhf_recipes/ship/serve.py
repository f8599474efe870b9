"""Exported models behind an OpenAI-compatible endpoint of this machine, by an engine that is installed.

The server is the engine's own, `transformers serve` or `vllm serve`, a process beside this one, behind `guard`. Each
model has a name, by which it is asked for: that of its folder or, of a run, that of the model.
"""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError, URLError

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils.import_utils import is_serve_available

from ..records.files import read_json
from ..records.folder import EXPORT, read_export
from .measure import LARGEST_KL
from .merged import export_merged
from .trained import ExportSettings, find_trained

Engine = Literal["transformers", "vllm"]
HOST = "127.0.0.1"
GUARD = Path(__file__).with_name("guard.py")
MODULE = "rlhf_recipes_guard"  # by which vLLM imports it
INSTALL = {"transformers": "pip install 'rlhf_recipes[serve]'", "vllm": "pip install 'rlhf_recipes[vllm]'"}
PLACE = "exports"  # in a run folder: what was exported of it to be served


@dataclass(frozen=True)
class Served:
    """An exported policy, and the name by which it is asked for."""

    name: str
    folder: Path
    record: dict[str, Any]  # its export.json

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter, which needs its base."""
        return self.record["format"] == "adapter"

    @property
    def is_conversational(self) -> bool:
        """Whether it takes messages, and not texts to continue."""
        return (self.folder / "chat_template.jinja").is_file()


def find_engine(engine: Engine | None) -> Engine:
    """The engine that is named, or else the first that is installed: vLLM, then transformers' own.

    Raises ValueError where it is not installed, with how to install it.
    """
    there: dict[Engine, bool] = {
        "vllm": shutil.which("vllm", path=_path()) is not None,
        "transformers": is_serve_available(),
    }
    if engine is not None and not there[engine]:
        raise ValueError(f"--engine {engine} is not installed: {INSTALL[engine]}")
    installed: list[Engine] = [name for name in there if there[name]]
    if not installed:
        raise ValueError(f"No engine is installed that serves: {INSTALL['transformers']}, or {INSTALL['vllm']}")
    return engine or installed[0]


def find_served(folder: Path, models: Sequence[str] = ()) -> list[Served]:
    """What is served of an export, or of a run, whose models are exported first where that has not been done.

    Args:
        models: of a run; none: its last policy.
    Raises:
        ValueError: the folder is neither, or what it holds is not served.
    """
    record = read_export(folder)
    if record is None:
        return [_exported(folder, name) for name in models or (None,)]
    if models:
        raise ValueError(f"--models is for a run folder, and {folder} is an export.")
    return [_served(folder.absolute().name, folder, record)]


def _served(name: str, folder: Path, record: dict[str, Any]) -> Served:
    """Raises ValueError where it is no policy that the engines take."""
    if record["format"] in ("gguf", "ollama"):
        raise ValueError(f"{folder} is a GGUF file: `llama-server --jinja -m {folder}/model.gguf` serves it.")
    if record["format"] == "reward" or not (folder / "generation_config.json").is_file():
        raise ValueError(f"{folder} is a reward model, which says nothing: see ship/README.md for what takes it.")
    return Served(name, folder, record)


def _exported(run_dir: Path, model: str | None) -> Served:
    """A model of a run, exported into the run folder, unless that has been done and it was not trained since."""
    trained = find_trained(run_dir, model, scores=False)
    name = trained.name.replace("/", "-")
    folder = run_dir / PLACE / name
    if not folder.exists():
        print(f"{folder}: exporting {trained.name}", flush=True)
        export_merged(run_dir, folder, ExportSettings(trained.name))
    record = read_export(folder)
    if record is None or record.get("adapter") != trained.digest:
        raise ValueError(f"{folder} is not of the {trained.name} that {run_dir} holds now: delete it.")
    return _served(name, folder, record)


def command(engine: Engine, served: Sequence[Served], port: int, options: Sequence[str] = ()) -> list[str]:
    """The engine's command, in a folder in which each model's folder has its name.

    Args:
        options: of the engine, and handed to it as they are.
    Raises:
        ValueError: the engine does not serve these together.
    """
    names = [model.name for model in served]
    if len(set(names)) < len(names):
        raise ValueError(f"Two models have one name ({', '.join(names)}): rename a folder.")
    ours = ["--host", HOST, "--port", str(port), *options]
    adapters = [model for model in served if model.is_adapter]
    if engine == "transformers":
        if adapters:
            raise ValueError(f"transformers serves no adapter, and {adapters[0].folder} is one: take --engine vllm.")
        # -P: neither beside the guard nor in the folder of models is anything to be imported.
        return [sys.executable, "-P", str(GUARD), "serve", *names[: len(names) == 1], *ours]
    ours = ["--middleware", f"{MODULE}.Guard", *ours]
    if not adapters and len(served) == 1:
        return ["vllm", "serve", names[0], "--served-model-name", names[0], *ours]
    bases = {_base_id(model) for model in adapters}
    if len(adapters) < len(served) or len(bases) > 1:
        raise ValueError(
            "vLLM serves one merged model, or adapters of one base: export them by --format adapter, or take "
            "--engine transformers."
        )
    revision = read_json(served[0].folder / "adapter_config.json").get("revision")
    ranks = [read_json(model.folder / "adapter_config.json")["r"] for model in adapters]
    return [
        *("vllm", "serve", *bases, *([f"--revision={revision}"] if revision else [])),
        # The template and what ends a response are those of training, which the base's files may not have.
        *("--tokenizer", names[0], "--generation-config", names[0]),
        *("--enable-lora", "--max-loras", str(len(served)), f"--max-lora-rank={max(ranks)}"),
        *("--lora-modules", *(f"{name}={name}" for name in names), *ours),
    ]


def _base_id(model: Served) -> str:
    """An adapter's base on the Hub. Raises ValueError where it is no name there: vLLM may take it for an option."""
    try:
        validate_repo_id(model.record["base_id"])
    except HFValidationError as error:
        raise ValueError(f"{model.folder / EXPORT}: base_id: {error}") from error
    return model.record["base_id"]


def how_to_ask(served: Sequence[Served], port: int) -> str:
    """A `curl` and a Python line for each model, to be copied."""
    url, blocks = f"http://{HOST}:{port}/v1", []
    for model in served:
        if model.is_conversational:
            body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello!"}]}
            path, call, answer = "chat/completions", "chat.completions.create", "message.content"
        else:
            body, path, call, answer = {"prompt": "Once upon a time"}, "completions", "completions.create", "text"
        asked = {"model": model.name, **body}
        words = ", ".join(f"{key}={json.dumps(value)}" for key, value in asked.items())
        client = f'OpenAI(base_url="{url}", api_key="none")'
        code = f"from openai import OpenAI; print({client}.{call}({words}).choices[0].{answer})"
        blocks.append(
            f"{model.name}:\n"
            f"  curl {url}/{path} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(asked))}\n"
            f"  python -c {shlex.quote(code)}"
        )
    return "\n".join(blocks)


def warnings(engine: Engine, served: Sequence[Served]) -> Iterator[str]:
    """What is known to be off: an adapter that was trained on a quantized base, on the one without."""
    for model in served:
        kl = model.record["measured"].get("original", {}).get("kl", 0.0) if engine == "vllm" else 0.0
        if model.is_adapter and kl > LARGEST_KL:
            yield (
                f"{model.name}: on its base without quantization, as vLLM loads it, it is {kl:.2g} nats a token away "
                "from what was trained. A merged export is closer."
            )


@contextmanager
def serving(engine: Engine, served: Sequence[Served], port: int, options: Sequence[str] = ()) -> Iterator[Any]:
    """A block in which the models are served: the engine's process. It is ended with the block.

    Raises ValueError where the port is taken, the engine ends before it answers, or has not taken the guard.
    """
    words = command(engine, served, port, options)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that a server has just left is free
        if listener.connect_ex((HOST, port)) == 0:
            raise ValueError(f"Something else listens at {HOST}:{port}: choose another --port.")
    with tempfile.TemporaryDirectory(prefix="rlhf_recipes-serve-") as temporary:
        room = Path(temporary, "models")
        room.mkdir()
        for model in served:
            (room / model.name).symlink_to(model.folder.absolute())
        # What the engine prints goes to standard error: on standard output is how to ask it.
        process = subprocess.Popen(words, cwd=room, env=_environment(engine, Path(temporary)), stdout=2)
        try:
            _wait_until_it_answers(process, port)
            _check_guarded(port)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _environment(engine: Engine, folder: Path) -> dict[str, str]:
    """The variables of an engine's process, for which a folder of its own is there, beside the models."""
    kept = os.environ.get("PYTHONPATH")
    places = [os.path.abspath(place) for place in kept.split(os.pathsep)] if kept else []  # and none among the models
    if engine == "transformers":  # which would list, and load when asked, whatever else the machine has in its cache
        alone = {"HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    else:  # which may run in a Python without this package: it finds the guard, and none of the files beside it
        alone, places = {}, [str(folder / "guard"), *places]
        (folder / "guard").mkdir()
        (folder / "guard" / f"{MODULE}.py").symlink_to(GUARD)
    return {**os.environ, "PATH": _path(), "PYTHONPATH": os.pathsep.join(places), **alone}


def _wait_until_it_answers(process: Any, port: int) -> None:
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.2)
    raise ValueError(f"The engine ended with code {process.returncode} before it answered: see above.")


def _check_guarded(port: int) -> None:
    """Raises ValueError where a foreign page is answered."""
    foreign = urllib.request.Request(f"http://{HOST}:{port}/health", headers={"Origin": "http://foreign.invalid"})
    with suppress(HTTPError), urllib.request.urlopen(foreign, timeout=60):
        raise ValueError(
            "The engine has not taken its --middleware, answers any web page, and was ended. vLLM's server in Rust "
            "takes none: unset VLLM_USE_RUST_FRONTEND."
        )


def _path() -> str:
    """Where commands are looked for: beside this Python first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
