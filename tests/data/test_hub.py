"""A Hub that does not answer: it is asked once, and the cache is used."""

import os
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import constants
from support.tiny_models import save_model

from rlhf_recipes.data import hub
from rlhf_recipes.data.read import read
from rlhf_recipes.model.base import base_config, load_base, load_tokenizer
from rlhf_recipes.recipe.values import Base, Source

COMMIT = "a" * 40


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the Hub with one model in it."""
    cache = tmp_path_factory.mktemp("hub")
    save_model(cache / "models--org--cached" / "snapshots" / COMMIT)
    (cache / "models--org--cached" / "refs").mkdir()
    (cache / "models--org--cached" / "refs" / "main").write_text(COMMIT)
    return cache


@pytest.fixture(params=["refuses", "500", "429", "hangs"])
def requests(request: pytest.FixtureRequest, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A Hub that fails in one of its ways. Yields the requests that reach it."""
    seen: list[str] = []
    ends = threading.Event()

    class Fails(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            seen.append(self.path)
            if request.param == "hangs":
                ends.wait()
            else:
                self.send_error(int(request.param))

        do_HEAD = do_POST = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Fails)
    for name, value in {
        "ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(cache),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "TIMEOUT", 0.2)
    if request.param == "refuses":
        server.server_close()
        yield seen
        return
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield seen
    ends.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_base_in_the_cache_is_used_where_the_hub_does_not_answer(
    requests: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    base = Base("org/cached")
    for load in (base_config, load_tokenizer, load_base):
        load(base)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(said) == 1 and "the Hub does not answer" in said[0] and "The cache is used, offline" in said[0]
    assert requests in ([], ["/api/models/org/cached"])
    assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE


def test_a_base_that_is_nowhere_is_refused_at_once(requests: list[str]) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="org/gone is no folder, not in the cache, and the Hub does not answer"):
            load_tokenizer(Base("org/gone"))
    assert requests in ([], ["/api/models/org/gone"])


@pytest.mark.parametrize("requests", ["500"], indirect=True)
@pytest.mark.parametrize("data", ["org/gone", "hf://datasets/org/gone/train.jsonl"])
def test_a_dataset_that_is_nowhere_is_refused_at_once(requests: list[str], data: str) -> None:
    with pytest.raises(ValueError, match=r"sft\.data: .*org/gone"):
        list(read("sft", Source(data=data)))
    assert requests == ["/api/datasets/org/gone"]


@pytest.mark.parametrize("requests", ["500"], indirect=True)
def test_a_folder_is_nothing_to_ask_the_hub_about(requests: list[str], cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache / "models--org--cached" / "snapshots" / COMMIT, tmp_path / "model")
    load_tokenizer(Base(str(tmp_path / "model")))
    os.mkdir(tmp_path / "data")
    (tmp_path / "data" / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert len(list(read("sft", Source(data=str(tmp_path / "data"))))) == 1
    assert requests == [] and not constants.HF_HUB_OFFLINE
