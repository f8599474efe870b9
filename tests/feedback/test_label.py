"""The labelers' page: who gets what, what is written, who is let in; and the page itself in a real Chromium."""

import errno
import json
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Browser, Page, expect
from starlette.applications import Starlette
from support.command_line import error_of, start
from support.hostile import HOSTILE, ODD
from support.label_page import TOKEN, Client, done, press, serving, shown
from support.paths import ROOT
from support.tiny_models import make_tokenizer

from rlhf_recipes.data.prepare import prepare
from rlhf_recipes.feedback.board import Board
from rlhf_recipes.feedback.label import serve_label_page
from rlhf_recipes.feedback.live import Asked, Show
from rlhf_recipes.feedback.rows import read_labels, read_samples
from rlhf_recipes.recipe.values import Stage
from rlhf_recipes.records.lock import held
from rlhf_recipes.report.access import Access, Refusal, access_file

REMARKS = {"seconds": 1.0, "note": "", "flag": False}


def write_samples(folder: Path, count: int, k: int = 3) -> Path:
    """Samples s0, s1, ...: response i of sample n is "n.i"."""
    rows = [
        {
            "id": f"s{n}",
            "prompt": f"Prompt {n}",
            "responses": [f"{n}.{i}" for i in range(k)],
            "origins": [{"model": f"secret-{i}"} for i in range(k)],
        }
        for n in range(count)
    ]
    return write(folder / "samples.jsonl", rows)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def make_board(folder: Path, count: int = 10, k: int = 3, overlap: float = 0.2, seed: int = 0) -> Board:
    return Board(read_samples(write_samples(folder, count, k)), folder / "labels.jsonl", overlap, seed)


def judge(board: Board, labeler: str, id: str, ranking: list[int] | None = None, **changes: Any) -> None:
    ranking = ranking or list(range(1, len(board._groups(labeler, id)) + 1))
    board.rank(labeler, {"id": id, "ranking": ranking, **REMARKS, **changes})


# --- Who judges what --------------------------------------------------------------------------------------------------


def test_shared_samples_go_to_all_and_each_other_to_one(tmp_path: Path) -> None:
    board = make_board(tmp_path, count=21, overlap=0.3)
    assert len(board.shared) == 7  # 0.3 of 21, rounded up
    names, shown = ["Ann", "Bob", "Cem"], defaultdict(list)
    while any(board.state(name)["item"] for name in names):
        held = [board.leases[name].id for name in names if name in board.leases]
        assert all(count == 1 or id in board.shared for id, count in Counter(held).items())
        for name in names:
            if item := board.state(name)["item"]:
                shown[name].append(item["id"])
                judge(board, name, item["id"])
    assert all(board.shared < set(ids) for ids in shown.values())
    assert Counter(id for ids in shown.values() for id in ids) == {
        id: 3 if id in board.shared else 1 for id in board.samples
    }
    assert len(rows_of(tmp_path / "labels.jsonl")) == 3 * 7 + 14
    assert board.state("Ann") | {"seconds": 0} == {
        **{"labeler": "Ann", "item": None, "elsewhere": 0, "seconds": 0, "last": shown["Ann"][-1]},
        **{"done": len(shown["Ann"]), "total": len(shown["Ann"])},
    }


@pytest.mark.parametrize("seed", range(5))
def test_whatever_labelers_do_files_and_server_agree(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judging, skipping, undoing, vanishing and killing at random: no sample has two labels that should have one."""
    draw, names = random.Random(seed), ["Ann", "Bob", "Cem"]
    board = make_board(tmp_path, count=12, overlap=0.25)
    refused, kinds = Counter[int](), ["judge"] * 4 + ["skip", "undo", "repeat", "kill", "vanish"]
    for _ in range(150):
        name, kind = draw.choice(names), draw.choice(kinds)
        item = board.state(name)["item"]
        mine = board.done.get(name, {})
        try:
            if kind == "kill":
                board = make_board(tmp_path, count=12, overlap=0.25)
            elif kind == "vanish":
                monkeypatch.setattr("rlhf_recipes.feedback.board.LEASE", draw.choice([600.0, -1.0]))
            elif kind == "undo" and mine:
                board.undo(name, {"id": list(mine)[-1]})
            elif kind == "repeat" and mine and "ranking" in list(mine.values())[-1]:
                judge(board, name, list(mine)[-1])
            elif kind == "skip" and item:
                board.skip(name, {"id": item["id"], **REMARKS})
            elif kind == "judge" and item:
                judge(board, name, item["id"])
        except Refusal as error:
            refused[error.status] += 1
        labels, skips = rows_of(tmp_path / "labels.jsonl"), rows_of(tmp_path / "labels.skipped.jsonl")
        once = Counter((row["id"], row["labeler"]) for row in labels + skips)
        assert set(once.values()) <= {1}
        assert all(count == 1 or id in board.shared for id, count in Counter(row["id"] for row in labels).items())
        assert {(id, name) for name, done in board.done.items() for id in done} == set(once)
        held = Counter(lease.id for lease in board.leases.values() if lease.id not in board.shared)
        assert set(held.values()) <= {1}
    assert set(refused) <= {409} and len(labels) >= 10


def test_a_sample_that_somebody_left_is_dealt_again_at_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = make_board(tmp_path, count=2, overlap=0)
    left = board.state("Ann")["item"]["id"]
    other = board.state("Bob")["item"]["id"]
    assert other != left
    judge(board, "Bob", other)
    assert (board.state("Bob")["item"], board.state("Bob")["elsewhere"]) == (None, 1)
    monkeypatch.setattr("rlhf_recipes.feedback.board.LEASE", -1.0)
    assert board.state("Bob")["item"]["id"] == left
    with pytest.raises(Refusal, match="Another labeler"):
        judge(board, "Ann", left)
    board.stay("Ann", {"id": left})
    assert board.leases["Bob"].id == left and board.state("Ann")["total"] == 1  # she may take it back from him


def test_after_a_restart_the_sample_on_a_page_is_still_its_labelers(tmp_path: Path) -> None:
    shown = make_board(tmp_path, count=30, overlap=0).state("Ann")["item"]["id"]
    board = make_board(tmp_path, count=30, overlap=0)
    board.stay("Ann", {"id": shown})
    assert all(board.state(f"labeler {n}")["item"]["id"] != shown for n in range(29))
    judge(board, "Ann", shown)
    assert [row["id"] for row in rows_of(tmp_path / "labels.jsonl")] == [shown]


def test_after_a_restart_the_last_judgement_is_the_last(tmp_path: Path) -> None:
    board = make_board(tmp_path, overlap=1)
    ids = []
    for turn in range(4):
        ids.append(board.state("Ann")["item"]["id"])
        if turn % 2:
            judge(board, "Ann", ids[-1])
        else:
            board.skip("Ann", {"id": ids[-1], **REMARKS})
        time.sleep(0.002)  # judgements have their time in milliseconds
    board = make_board(tmp_path, overlap=1)
    for id in reversed(ids):
        assert board.state("Ann")["last"] == id
        board.undo("Ann", {"id": id})
    assert board.state("Ann")["done"] == 0


def test_after_a_restart_the_last_judgement_is_the_last_though_the_clock_was_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board, given = make_board(tmp_path), []
    for hour in (12, 11, 13):
        monkeypatch.setattr("rlhf_recipes.feedback.board._now", lambda hour=hour: f"2026-03-31T{hour}:00:00.000+00:00")
        given.append(board.state("Ann")["item"]["id"])
        judge(board, "Ann", given[-1])
        assert make_board(tmp_path).state("Ann")["last"] == given[-1]


def test_orders_are_each_labelers_own_and_stay(tmp_path: Path) -> None:
    board, again = make_board(tmp_path, count=30, k=4), make_board(tmp_path, count=30, k=4)
    other = make_board(tmp_path, count=30, k=4, seed=1)
    assert board.shared == again.shared != other.shared
    orders = {name: [board._groups(name, id) for id in board.samples] for name in ("Ann", "Bob")}
    assert orders["Ann"] == [again._groups("Ann", id) for id in board.samples]
    assert orders["Ann"] != orders["Bob"] and orders["Ann"] != [other._groups("Ann", id) for id in board.samples]
    first = Counter(order[0][0] for order in orders["Ann"] + orders["Bob"])
    assert set(first) == {0, 1, 2, 3} and max(first.values()) < 30  # of 60, 15 each are expected


def test_ranks_in_the_order_shown_become_ranks_of_the_responses(tmp_path: Path) -> None:
    """Six responses, two of them equal, which are shown as one."""
    rows = [{"id": "a", "prompt": "P", "responses": ["u", "v", "w", "v", "x", "y"], "weight": 3.0, "topic": "t"}]
    board = Board(read_samples(write(tmp_path / "s.jsonl", rows)), tmp_path / "l.jsonl", 1.0, 0)
    shown = board.state("Ann")["item"]["responses"]
    assert sorted(shown) == ["u", "v", "w", "x", "y"]
    ranks = {"u": 5, "v": 1, "w": 3, "x": 3, "y": 5}  # with gaps, which close
    judge(board, "Ann", "a", [ranks[text] for text in shown], note=" n ", flag=True, seconds=2.345)
    (row,) = rows_of(tmp_path / "l.jsonl")
    assert row["ranking"] == [3, 1, 2, 1, 2, 3]
    assert sorted(row["order"]) == [0, 1, 2, 3, 4, 5]
    assert list(dict.fromkeys(row["responses"][index] for index in row["order"])) == shown
    assert (row["labeler"], row["seconds"], row["note"], row["flag"], row["topic"]) == ("Ann", 2.3, "n", True, "t")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", row["time"]) and "weight" not in row


def test_the_pace_is_the_median_of_the_last_twenty(tmp_path: Path) -> None:
    board = make_board(tmp_path, count=31)
    for seconds in range(1, 31):
        judge(board, "Ann", board.state("Ann")["item"]["id"], seconds=seconds)
    board.skip("Ann", {"id": board.state("Ann")["item"]["id"], **REMARKS, "seconds": 1000})
    assert board.state("Ann")["seconds"] == 20.5 and board.state("Bob")["seconds"] is None


def test_labels_are_data_for_the_reward_stage(tmp_path: Path) -> None:
    board = make_board(tmp_path, count=6, k=4, overlap=1)
    for id in board.samples:
        judge(board, "Ann", id, [1, 2, 2, 4])
        judge(board, "Bob", id, [1, 1, 1, 1])
    assert all(label["labeler"] for label in map(json.loads, (tmp_path / "labels.jsonl").open())), "so they are known"
    found = prepare("reward", Stage(data=str(tmp_path / "labels.jsonl"), heldout=0.0), make_tokenizer(), None)
    assert (found.report["rows"], found.report["used"], found.report["dropped"]) == (12, 6, {"all tied": 6})
    for row, written in zip(found.train.to_list(), rows_of(tmp_path / "labels.jsonl")[::2], strict=True):
        assert row["ranking"] == written["ranking"] and sorted(row["ranking"]) == [1, 2, 2, 3]
    assert len(read_labels([tmp_path / "labels.jsonl"])) == 12


def test_undo_gives_back_the_sample_and_what_was_said(tmp_path: Path) -> None:
    board = make_board(tmp_path)
    first = board.state("Ann")["item"]
    judge(board, "Ann", first["id"], [2, 1, 2], note="why", seconds=7)
    second = board.state("Ann")["item"]
    board.skip("Ann", {"id": second["id"], **REMARKS, "note": "what?"})
    assert board.state("Ann")["last"] == second["id"] and board.state("Ann")["done"] == 2
    for _ in range(2):  # the second time is a retry, and takes nothing more back
        board.undo("Ann", {"id": second["id"]})
        state = board.state("Ann")
        assert state["item"]["former"] == {"ranking": None, "seconds": 1.0, "note": "what?", "flag": False}
        assert (state["last"], state["done"]) == (first["id"], 1)
    board.undo("Ann", {"id": first["id"]})
    former = {"ranking": [2, 1, 2], "seconds": 7.0, "note": "why", "flag": False}
    assert board.state("Ann")["item"] == first | {"former": former}
    assert rows_of(tmp_path / "labels.jsonl") == rows_of(tmp_path / "labels.skipped.jsonl") == []
    board.undo("Bob", {"id": first["id"]})  # it is not his
    assert board.state("Bob")["item"]["former"] is None


def test_a_skipped_sample_goes_to_another_and_then_cannot_be_taken_back(tmp_path: Path) -> None:
    board = make_board(tmp_path, count=1, overlap=0)
    id = board.state("Ann")["item"]["id"]
    board.skip("Ann", {"id": id, **REMARKS, "flag": True})
    assert board.state("Ann")["item"] is None and board.state("Bob")["item"]["id"] == id
    (row,) = rows_of(tmp_path / "labels.skipped.jsonl")
    assert row | {"time": ""} == {
        **{"id": id, "labeler": "Ann", "skipped": True, "seconds": 1.0, "flag": True, "time": ""},
    }
    with pytest.raises(Refusal, match="Another labeler"):
        board.undo("Ann", {"id": id})
    assert rows_of(tmp_path / "labels.skipped.jsonl") == [row]


def test_said_twice_is_written_once(tmp_path: Path) -> None:
    board = make_board(tmp_path)
    id = board.state("Ann")["item"]["id"]
    for _ in range(3):
        judge(board, "Ann", id, [1, 2, 3])
    with pytest.raises(Refusal, match="already"):
        judge(board, "Ann", id, [3, 2, 1])
    with pytest.raises(Refusal, match="already"):
        board.skip("Ann", {"id": id, **REMARKS})
    assert len(rows_of(tmp_path / "labels.jsonl")) == 1 and not rows_of(tmp_path / "labels.skipped.jsonl")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"id": "s99"}, "no such sample"),
        ({"id": ["s1"]}, "no such sample"),
        ({"ranking": None}, "3 whole numbers"),
        ({"ranking": [1, 2]}, "3 whole numbers"),
        ({"ranking": [1, 2, 4]}, "3 whole numbers"),
        ({"ranking": [0, 1, 2]}, "3 whole numbers"),
        ({"ranking": [1, 2, True]}, "3 whole numbers"),
        ({"ranking": [1, 2, 2.0]}, "3 whole numbers"),
        ({"seconds": -1}, "seconds"),
        ({"seconds": float("nan")}, "seconds"),
        ({"seconds": "1"}, "seconds"),
        ({"note": "x" * 2001}, "2,000 characters"),
        ({"flag": 1}, "flag"),
    ],
)
def test_a_wrong_judgement_is_refused_and_not_written(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    board = make_board(tmp_path)
    said = {"id": board.state("Ann")["item"]["id"], "ranking": [1, 2, 3], **REMARKS, **changes}
    with pytest.raises(Refusal, match=part) as error:
        board.rank("Ann", said)
    assert error.value.status in (404, 422)
    assert not (tmp_path / "labels.jsonl").exists() and board.state("Ann")["done"] == 0


# --- Who is let in ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with serving(write_samples(tmp_path_factory.mktemp("client"), 5)) as link:
        yield Client(link)


@pytest.mark.parametrize(
    ("said", "headers", "status"),
    [
        ({"labeler": "Ann"}, {}, 200),
        ({"labeler": "Åse M. O-2_b"}, {}, 200),
        ({"labeler": "Ann"}, {"Content_Type": "application/json; charset=utf-8"}, 200),
        ({"labeler": "Ann"}, {"Cookie": ""}, 403),
        ({"labeler": "Ann"}, {"Cookie": "page-000000000000=a-token"}, 403),
        ({"labeler": "Ann"}, {"Origin": "http://evil.example"}, 403),
        ({"labeler": "Ann"}, {"Origin": ""}, 403),
        ({"labeler": "Ann"}, {"Origin": "null"}, 403),
        ({"labeler": "Ann"}, {"Origin": "http://[::1"}, 403),
        ({"labeler": "Ann"}, {"Host": "evil.example", "Origin": "http://evil.example"}, 400),
        ({"labeler": "Ann"}, {"Content_Type": "text/plain"}, 415),
        ({"labeler": "Ann", "more": "x" * 70_000}, {}, 413),
        ("{", {}, 400),
        ("[" * 20_000, {}, 400),
        ("[]", {}, 400),
        ({}, {}, 422),
        ({"labeler": " "}, {}, 422),
        ({"labeler": "<b>"}, {}, 422),
        ({"labeler": "a\nb"}, {}, 422),
        ({"labeler": "x" * 41}, {}, 422),
        ({"labeler": 7}, {}, 422),
    ],
)
def test_only_our_own_page_is_answered(client: Client, said: Any, headers: dict[str, str], status: int) -> None:
    found, answer = client.post("/start", said, **headers)
    assert found == status, answer
    assert ("item" in answer) == (status == 200)


def test_without_the_token_there_is_no_page(client: Client) -> None:
    for path in ("/", "/?token=", "/?token=another", "/?token=%ff"):
        status, _, text = client("GET", path)
        assert status == 403 and "Open the link" in text and "<html" not in text
    assert client("GET", "/", Cookie=client.cookie)[0] == 200
    assert client("GET", "/judge", Cookie=client.cookie)[0] == 405
    assert client.post("/other", {"labeler": "Ann"})[0] == 404


def test_a_browser_has_some_names_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_recipes.feedback.label.NAMES", 2)
    with serving(write_samples(tmp_path, 5)) as link:
        client, other = Client(link), Client(link)
        assert [client.post("/start", {"labeler": name})[0] for name in ("Ann", "Bob", "Cem", "Ann")] == [
            200,
            200,
            429,
            200,
        ]
        assert other.post("/start", {"labeler": "Cem"})[0] == 200


def test_a_browser_that_sends_too_many_requests_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in (("RATE", 2), ("BURST", 10)):
        monkeypatch.setattr(f"rlhf_recipes.report.access.{name}", number)
    with serving(write_samples(tmp_path, 5)) as link:
        client, other = Client(link), Client(link)
        answers = [client.post("/start", {"labeler": "Ann"}) for _ in range(40)]
        status, said = answers[-1]
        assert answers[0][0] == 200 and status == 429 and "too many requests" in said["error"]
        assert client("GET", "/", Cookie=client.cookie)[0] == 429
        assert other.post("/start", {"labeler": "Bob"})[0] == 200
        opened = [client("GET", f"/?token={TOKEN}")[0] for _ in range(40)]
        assert opened[0] == 200 and opened[-1] == 429, "a new cookie is no way round it"
        assert other.post("/start", {"labeler": "Bob"})[0] == 200
        time.sleep(1)
        assert client.post("/start", {"labeler": "Ann"})[0] == 200


def test_browsers_that_rest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    access, now = Access(TOKEN), 0.0
    monkeypatch.setattr("rlhf_recipes.report.access.time.monotonic", lambda: now)
    for number in range(10_000):
        now += 0.01
        access.check_rate(f"browser {number}")
    assert len(access._free) <= 301
    for _ in range(299):
        access.check_rate("another")
    access.check_rate("another")
    with pytest.raises(Refusal, match="too many requests"):
        access.check_rate("another")
    now += 0.1
    access.check_rate("another")


def test_orders_of_many_labelers_do_not_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_recipes.feedback.board.ORDERS", 3)
    board = make_board(tmp_path)
    for n in range(10):
        board.state(f"L{n}")
        assert len(board.sequences) <= 3


@pytest.mark.parametrize("seconds", ["x", True, float("nan"), -1, [], None])
def test_seconds_that_are_none_do_not_stop_the_page(tmp_path: Path, seconds: Any) -> None:
    rows = [{"id": f"s{n}", "labeler": "Ann", "ranking": [1, 2, 3], "seconds": s} for n, s in enumerate((seconds, 3))]
    write(tmp_path / "labels.jsonl", rows)
    assert make_board(tmp_path).state("Ann")["seconds"] == 3


def opened_sockets(link: str, count: int, sent: bytes) -> list[socket.socket]:
    host, port = link.split("/")[2].split(":")
    made = [socket.create_connection((host, int(port)), timeout=5) for _ in range(count)]
    for one in made:
        one.sendall(sent)
    return made


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_who_has_the_token_gets_in_past_silent_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_recipes.report.server.MOST_WAITING", 20)
    with serving(write_samples(tmp_path, 5)) as link:
        silent = opened_sockets(link, 60, b"GET / HTTP/1.1\r\nX-")
        assert Client(link).post("/start", {"labeler": "Ann"})[0] == 200
        assert all(map(is_closed, silent[:20]))
        for one in silent:
            one.close()


def test_a_request_that_does_not_come_whole_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_recipes.report.server.PATIENCE", 0.3)
    with serving(write_samples(tmp_path, 5)) as link:
        client = Client(link)
        head = (
            f"POST /start HTTP/1.1\r\nHost: {client.host}\r\nOrigin: http://{client.host}\r\n"
            f"Cookie: {client.cookie}\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{{"
        )
        (first,), (second,) = (opened_sockets(link, 1, sent) for sent in (b"GET / HTTP/1.1\r\nX-", head.encode()))
        assert is_closed(first) and is_closed(second)
        first.close()
        second.close()
        assert client.post("/start", {"labeler": "Ann"})[0] == 200


def test_a_head_without_end_is_refused(client: Client) -> None:
    (one,) = opened_sockets(f"http://{client.host}/", 1, b"GET / HTTP/1.1\r\nX: ")
    with suppress(OSError):  # it is not read to its end
        for _ in range(64):
            one.sendall(b"a" * 2**20)
    with suppress(ConnectionResetError):
        assert one.recv(100).startswith(b"HTTP/1.1 400")
    one.close()
    assert client.post("/start", {"labeler": "Ann"})[0] == 200


# --- Prompts that are typed -------------------------------------------------------------------------------------------


class SlowAnswers:
    """Answers as the test lets it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.go = threading.Event()

    def __call__(self, prompt: str, show: Show) -> Asked:
        self.asked.append(prompt)
        assert self.go.wait(10)
        return Asked({"id": prompt, "prompt": prompt, "responses": ["a", "b"]}, [0, 1])


def test_typed_prompts_take_turns_and_who_has_left_is_not_answered(tmp_path: Path) -> None:
    """One at a time is answered; a browser asks one at a time; and nobody asks from another page."""
    answers = SlowAnswers()
    with serving(tmp_path / "typed.jsonl", answer=answers) as link:
        first, second, third = Client(link), Client(link), Client(link)
        for headers in ({"Origin": "http://evil.example"}, {"Origin": ""}, {"Cookie": ""}):
            assert first.post("/ask", {"labeler": "Ann", "prompt": "p"}, **headers)[0] == 403
        left = HTTPConnection(second.host)
        said: list[Any] = []
        asking = [
            threading.Thread(target=lambda: said.append(first.post("/ask", {"labeler": "Ann", "prompt": "first"})))
        ]
        asking[0].start()
        until(lambda: answers.asked == ["first"])
        usual = {"Content-Type": "application/json", "Origin": f"http://{second.host}", "Cookie": second.cookie}
        left.request("POST", "/ask", json.dumps({"labeler": "Bob", "prompt": "second"}), usual)
        assert left.getresponse().status == 200
        assert "still being answered" in str(first.post("/ask", {"labeler": "Ann", "prompt": "again"})[1])
        assert "still being answered" in str(second.post("/ask", {"labeler": "Bob", "prompt": "again"})[1])
        left.close()
        until(lambda: second.post("/start", {"labeler": "Bob"})[0] == 200)
        asking.append(threading.Thread(target=third.post, args=("/ask", {"labeler": "Cem", "prompt": "third"})))
        asking[1].start()
        time.sleep(0.3)  # in which the server hears that the second has left
        answers.go.set()
        for thread in asking:
            thread.join()
    assert answers.asked == ["first", "third"]
    assert said[0][1]["state"]["item"]["prompt"][0]["content"] == "first"


def until(holds: Callable[[], bool]) -> None:
    limit = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_the_page_may_load_nothing_and_run_nothing_but_its_own(client: Client) -> None:
    policy = client.headers["content-security-policy"]
    nonce = re.search(r"script-src 'nonce-([\w-]{20,})'", policy)
    assert nonce and client.page.count(nonce[1]) == 2 and "{nonce}" not in client.page
    assert nonce[1] not in client("GET", "/", Cookie=client.cookie)[2]  # each page has its own
    assert "default-src 'none'" in policy and "unsafe" not in policy and "require-trusted-types-for 'script'" in policy
    assert "HttpOnly" in client.headers["set-cookie"] and "SameSite=strict" in client.headers["set-cookie"]
    assert not re.search(r"innerHTML|insertAdjacent|document\.write|eval\(|https?://", client.page)


def test_only_the_browser_that_gave_a_judgement_takes_it_back(client: Client) -> None:
    """Who has the link can give any name, but has no power over what others have judged."""
    _, state = client.post("/start", {"labeler": "Una"})
    item = state["item"]["id"]
    said = {"labeler": "Una", "id": item, "ranking": list(range(1, len(state["item"]["responses"]) + 1)), "seconds": 1}
    assert client.post("/judge", {**said, "browser": "another's"})[1]["last"] == item
    other = Client(f"http://{client.host}/?token={TOKEN}")
    status, answer = other.post("/undo", {**said, "browser": "another's"})
    assert status == 403 and "given in another browser" in answer["error"]
    # The link opened again is the same browser; a cookie that somebody else has made is none.
    _, headers, _ = client("GET", f"/?token={TOKEN}", Cookie=client.cookie)
    assert headers["set-cookie"].partition(";")[0] == client.cookie
    name, _, value = client.cookie.partition("=")
    for forged in (f"{name}={TOKEN}", f"{name}=x.{value.rpartition('.')[2]}", f"{name}=.", f"{name}="):
        assert client.post("/undo", said, Cookie=forged)[0] == 403
    assert client.post("/undo", said)[1]["last"] is None


def test_what_cannot_be_written_is_said_to_the_labeler_and_the_page_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = tmp_path / "labels.jsonl"
    with serving(write_samples(tmp_path, 3)) as link:
        client = Client(link)

        def judge() -> tuple[int, Any]:
            item = client.post("/start", {"labeler": "Ann"})[1]["item"]
            return client.post("/judge", {"labeler": "Ann", "id": item["id"], "ranking": [1, 2, 3], **REMARKS})

        def full(descriptor: int) -> None:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        assert judge()[0] == 200
        monkeypatch.setattr(os, "fsync", full)
        status, answer = judge()
        assert status == 507 and f"{labels}: the quota is used up: make room" in answer["error"]
        monkeypatch.undo()
        labels.rename(tmp_path / "moved")
        status, answer = judge()
        assert status == 507 and f"{labels} was deleted or moved while this ran, with 1 rows" in answer["error"]
        assert not labels.exists()
        (tmp_path / "moved").rename(labels)
        assert judge()[0] == 200 and len(rows_of(labels)) == 2


def test_labels_that_were_deleted_while_the_page_was_open_are_written_again_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, labels = write_samples(tmp_path, 3), tmp_path / "labels" / "labels.jsonl"

    def served(app: Starlette, *rest: Any) -> None:
        board: Board = app.state.board
        for _ in range(2):
            judge(board, "Ann", board.state("Ann")["item"]["id"])
        shutil.rmtree(labels.parent)
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf_recipes.feedback.label.serve", served)
    serve_label_page(samples, labels, port=0)
    assert [row["labeler"] for row in rows_of(labels)] == ["Ann", "Ann"]


def test_the_token_is_kept_where_nobody_else_writes(tmp_path: Path) -> None:
    labels = tmp_path / "labels.jsonl"
    (tmp_path / "labels.token").write_text("known to somebody else\n")
    first, again = Access(path=access_file("label", labels)), Access(path=access_file("label", labels))
    assert again.token == first.token != "known to somebody else" and len(again.token) > 20
    assert access_file("label", labels).parent.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in tmp_path.iterdir()] == ["labels.token"]


def test_nothing_that_is_sent_tells_the_origins(client: Client) -> None:
    _, answer = client.post("/start", {"labeler": "Eve"})
    assert answer["item"].keys() == {"id", "prompt", "responses", "former"} and "secret" not in json.dumps(answer)


# --- The command ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_labelled_is_said_before_the_page_opens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = str(write_samples(tmp_path, 3))
    assert "there is no file" in error_of(capsys, ["label", str(tmp_path / "absent.jsonl")])
    assert "there is no file absent.md" in error_of(capsys, ["label", samples, "--guidelines", "absent.md"])
    assert "between 0 and 1" in error_of(capsys, ["label", samples, "--overlap", "20"])
    assert "a file of their own" in error_of(capsys, ["label", samples, "--labels", samples])
    for folder in (tmp_path, Path("/")):
        assert f"{folder}: it is a folder" in error_of(capsys, ["label", str(folder)])
    folder = tmp_path / "folder"
    folder.mkdir()
    assert f"{folder}: it is a folder" in error_of(capsys, ["label", samples, "--labels", str(folder)])
    same = write(tmp_path / "same.jsonl", [{"prompt": "P", "responses": ["a", "a"]}])
    assert "all the same" in error_of(capsys, ["label", str(same)])
    torn = tmp_path / "torn.labels.jsonl"
    torn.write_text("{}\n")
    assert "row 1: a judgement needs an 'id'" in error_of(capsys, ["label", samples, "--labels", str(torn)])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        assert f"cannot listen at {port}" in error_of(capsys, ["label", samples, "--port", port])
    assert "cannot listen at 99999" in error_of(capsys, ["label", samples, "--port", "99999"])
    with held(tmp_path / "samples.labels.jsonl"):
        assert "samples.labels.jsonl is in use by process" in error_of(capsys, ["label", samples])
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for module in ("feedback.label", "report.server"):
        monkeypatch.delitem(sys.modules, f"rlhf_recipes.{module}")
    assert "pip install 'rlhf_recipes[label]'" in error_of(capsys, ["label", samples])


@contextmanager
def command(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`rlhf-recipes label` in a process of its own, and the link that it prints."""
    line = [sys.executable, "-m", "rlhf_recipes.cli", "label", *words, "--overlap", "1"]
    process = start(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        link = re.fullmatch(r"Open (http://127\.0\.0\.1:\d+/\?token=\S+)\n", lines[1])
        assert link and lines[0].startswith("6 samples, 6 of them for everybody"), lines
        yield process, link[1]
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("share", [False, True])
def test_the_network_is_let_in_only_where_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, share: bool
) -> None:
    addresses: list[str] = []

    def stop(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        addresses.extend(listener.getsockname()[0] for listener in sockets)
        raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn.Server, "run", stop)
    serve_label_page(write_samples(tmp_path, 6), port=0, share=share)
    printed = capsys.readouterr()
    assert addresses == ["0.0.0.0" if share else "127.0.0.1"]
    assert printed.err.startswith("warning: everybody in this network") if share else printed.err == ""
    assert printed.out.startswith("6 samples, 2 of them for everybody; 0 labels so far.\nOpen http://127.0.0.1:")
    assert printed.out.endswith(f"0 judgements, 0 in all in {tmp_path / 'samples.labels.jsonl'}\n")


def test_a_shared_page_has_any_name_but_still_needs_the_token(tmp_path: Path) -> None:
    with serving(write_samples(tmp_path, 2), hosts=("*",)) as link:
        client = Client(link)
        assert client("GET", f"/?token={TOKEN}", Host="lab.example:8008")[0] == 200
        assert client("GET", "/", Host="lab.example:8008")[0] == 403


CERTIFICATE = ROOT / "tests" / "support" / "localhost.pem"  # of these tests alone, and its key


def test_a_shared_page_is_encrypted_by_a_given_certificate(tmp_path: Path) -> None:
    line = [
        sys.executable,
        "-m",
        "rlhf_recipes.cli",
        "label",
        str(write_samples(tmp_path, 2)),
        "--share",
        "--port",
        "0",
    ]
    process = start([*line, "--certificate", str(CERTIFICATE)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline().startswith("2 samples")
        opened = re.fullmatch(r"Open https://[^/]+:(\d+)(/\?token=\S+)\n", process.stdout.readline())
        assert opened
        port, path = int(opened[1]), opened[2]
        trusting = ssl.create_default_context(cafile=str(CERTIFICATE))
        page = HTTPSConnection("localhost", port, context=trusting)
        page.request("GET", path)
        answer = page.getresponse()
        answer.read()
        cookie = answer.headers["set-cookie"]
        assert answer.status == 200 and "; Secure" in cookie
        sent = {"Content-Type": "application/json", "Origin": f"https://localhost:{port}", "Cookie": cookie}
        page.request("POST", "/start", json.dumps({"labeler": "Ann"}), sent)
        assert json.loads(page.getresponse().read())["item"]["id"] in ("s0", "s1")
        plain = HTTPConnection("localhost", port)
        plain.request("GET", path)
        with pytest.raises((HTTPException, OSError)):
            plain.getresponse()
    finally:
        process.kill()
        printed = process.communicate()
    assert printed[1] == ""  # nothing is to be warned of


def test_a_certificate_that_cannot_be_used_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["label", str(write_samples(tmp_path, 2)), "--port", "0"]
    (tmp_path / "alone.pem").write_text(CERTIFICATE.read_text().partition("-----BEGIN PRIVATE KEY")[0])
    for options, said in [
        (["--certificate", str(CERTIFICATE)], "--certificate: a page of this machine alone is not encrypted: add --sh"),
        (["--share", "--key", str(CERTIFICATE)], "--key: it is the key of a certificate: --certificate."),
        (["--share", "--certificate", "none.pem"], "--certificate: there is no file none.pem."),
        (["--share", "--certificate", str(CERTIFICATE), "--key", "k.pem"], "--key: there is no file k.pem."),
        (["--share", "--certificate", str(tmp_path / "alone.pem")], "alone.pem and the key in it cannot be used"),
        (["--share", "--certificate", str(tmp_path / "samples.jsonl")], "What is needed are PEM files"),
    ]:
        assert said in error_of(capsys, [*line, *options])


# --- The page in Chromium ---------------------------------------------------------------------------------------------


def test_a_ranking_by_keyboard_alone(tmp_path: Path, opened: Callable[[str, str], Page]) -> None:
    labels, skips = tmp_path / "labels.jsonl", tmp_path / "labels.skipped.jsonl"
    with serving(write_samples(tmp_path, 5, k=4), guidelines="# Be <b>fair</b>") as link:
        page = opened(link, "Ann")
        assert page.url == link.partition("?")[0]  # the token has left the address bar
        expect(page.locator("#guidelines .text")).to_have_text("# Be <b>fair</b>")
        texts = shown(page)
        press(page, "2 1 Enter")
        expect(page.locator("#said")).to_have_text("Response C has no rank yet.")
        press(page, "= 5 4 n")  # a tie with the last, a rank that there is not, and the last one
        expect(page.locator("#note")).to_be_focused()
        page.keyboard.type("sn=1?u f")  # in a note, keys are letters
        press(page, "Escape f")
        assert not labels.exists()
        press(page, "Enter")
        done(page, 1, 5)
        (row,) = rows_of(labels)
        ranks = dict(zip(row["responses"], row["ranking"], strict=True))
        assert [ranks[text] for text in texts] == [2, 1, 1, 3]
        assert [row["responses"][index] for index in row["order"]] == texts
        assert (row["labeler"], row["note"], row["flag"]) == ("Ann", "sn=1?u f", True)
        assert 0 < row["seconds"] < 60

        press(page, "s")
        done(page, 2, 5)
        assert rows_of(skips)[0]["skipped"] is True
        press(page, "u")
        done(page, 1, 5)
        press(page, "u")
        done(page, 0, 5)
        assert rows_of(labels) == rows_of(skips) == []
        assert shown(page) == texts
        assert page.locator(".card button[aria-pressed=true]").all_text_contents() == ["2", "1", "1", "3"]
        expect(page.locator("#note")).to_have_value("sn=1?u f")
        expect(page.locator("#flag")).to_have_attribute("aria-pressed", "true")
        press(page, "ArrowLeft Backspace Enter")  # from the first to the last
        expect(page.locator("#said")).to_have_text("Response D has no rank yet.")
        press(page, "1 f Enter")
        done(page, 1, 5)
        again = rows_of(labels)[0]
        ranks = dict(zip(again["responses"], again["ranking"], strict=True))
        assert [ranks[text] for text in texts] == [2, 1, 1, 1]
        assert "flag" not in again and again["seconds"] >= row["seconds"]

        press(page, "?")
        expect(page.locator("#keys")).to_be_visible()
        press(page, "Escape g")
        expect(page.locator("#guidelines")).to_be_hidden()
        for count in range(2, 6):
            press(page, "1 2 3 4 Enter")
            done(page, count, 5)
        expect(page.locator("#end")).to_contain_text("Nothing is left for you.")
        press(page, "u")
        done(page, 4, 5)
        press(page, "4 3 2 1 Enter")
        done(page, 5, 5)
    assert len({row["id"] for row in rows_of(labels)}) == 5 == len(rows_of(labels))


def test_a_ranking_by_mouse_alone(tmp_path: Path, opened: Callable[[str, str], Page]) -> None:
    with serving(write_samples(tmp_path, 3)) as link:
        page = opened(link, "Ann")
        texts = shown(page)
        for response, rank in (("A", 3), ("B", 1), ("C", 1)):
            page.get_by_role("button", name=f"Response {response}: rank {rank}").click()
        page.get_by_role("button", name="Flag").click()
        page.get_by_role("button", name="Submit").dblclick()
        done(page, 1, 3)
        page.get_by_role("button", name="Skip").dblclick(delay=150)  # the next sample is there before the second click
        done(page, 2, 3)
        page.get_by_role("button", name="Undo").click()
        done(page, 1, 3)
    (row,) = rows_of(tmp_path / "labels.jsonl")
    ranks = dict(zip(row["responses"], row["ranking"], strict=True))
    assert [ranks[text] for text in texts] == [2, 1, 1] and row["flag"]
    assert rows_of(tmp_path / "labels.skipped.jsonl") == []


@pytest.mark.parametrize("truth", [[1, 2], [1, 1], [4, 2, 3, 1], [2, 1, 2, 1], [1, 1, 1, 1], [5, 2, 2, 9, 1, 5, 7]])
def test_comparisons_find_the_order(tmp_path: Path, opened: Callable[[str, str], Page], truth: list[int]) -> None:
    """A labeler who compares by hidden values: the ranking is theirs, after no more questions than there are pairs."""
    labels = tmp_path / "labels.jsonl"
    with serving(write_samples(tmp_path, 1, k=len(truth)), mode="pairs") as link:
        page = opened(link, "Ann")
        asked: list[frozenset[str]] = []
        while page.locator(".card").count():
            texts = shown(page)
            one, other = (truth[int(text.partition(".")[2])] for text in texts)
            asked.append(frozenset(texts))
            key = "1" if one < other else "2" if other < one else "="
            if len(truth) > 2 and len(asked) == 1:  # a mistake, which is taken back
                press(page, "2 Enter" if key == "1" else "1 Enter")
                assert frozenset(shown(page)) != asked[0]
                press(page, "u")
                assert shown(page) == texts
            press(page, f"{key} Enter")
            if shown(page) == texts:  # no pair is asked twice: this was the last, and is on its way
                done(page, 1, 1)
        (row,) = rows_of(labels)
        tiers = sorted(set(truth))
        assert row["ranking"] == [tiers.index(value) + 1 for value in truth]
        assert len(asked) == len(set(asked)) <= len(list(combinations(truth, 2)))
        press(page, "u")  # with all comparisons answered but the last, which waits to be submitted
        expect(page.locator(".card")).to_have_count(2)
        assert frozenset(shown(page)) == asked[-1] and not rows_of(labels)
        press(page, "Enter")
        done(page, 1, 1)
        assert rows_of(labels)[0]["ranking"] == row["ranking"]


def test_two_labelers_side_by_side(tmp_path: Path, opened: Callable[[str, str], Page]) -> None:
    with serving(write_samples(tmp_path, 10, k=2), overlap=0.3) as link:
        pages = {name: opened(link, name) for name in ("Ann", "Bob")}
        judged = Counter[str]()
        while any(page.locator(".card").count() for page in pages.values()):
            for name, page in pages.items():
                if page.locator(".card").count():
                    press(page, "1 Enter")
                    judged[name] += 1
                    done(page, judged[name])
    rows = rows_of(tmp_path / "labels.jsonl")
    assert judged == Counter(row["labeler"] for row in rows)
    counts = Counter(row["id"] for row in rows)
    assert sorted(counts.values()) == [1] * 7 + [2] * 3
    assert all(row["ranking"][row["order"][0]] == 1 for row in rows)
    orders = {name: [row["order"] for row in rows if row["labeler"] == name] for name in pages}
    assert all(len({tuple(order) for order in found}) == 2 for found in orders.values())


def test_a_killed_server_loses_nothing(tmp_path: Path, opened: Callable[[str, str], Page]) -> None:
    samples, labels = str(write_samples(tmp_path, 6, k=3)), tmp_path / "samples.labels.jsonl"
    with command(samples, "--port", "0") as (server, link):
        ann, bob = opened(link, "Ann"), opened(link, "Bob")
        for page in (ann, bob):
            press(page, "1 2 3 Enter")
            done(page, 1, 6)
        before = rows_of(labels)
        press(ann, "3 2 1 n")
        ann.keyboard.type("half a thought")
        server.send_signal(signal.SIGKILL)
        server.wait()
        press(ann, "Control+Enter")
        expect(ann.locator("#said")).to_contain_text("does not answer")
    assert rows_of(labels) == before and len(before) == 2
    with labels.open("a") as stream:
        stream.write('{"id": "s5", "prompt": "Prom')  # a write that the kill has torn

    port = link.split(":")[2].partition("/")[0]
    with command(samples, "--port", port) as (server, again):
        assert again == link and rows_of(labels) == before
        press(ann, "Control+Enter")  # the page is as it was, and goes on
        done(ann, 2, 6)
        assert rows_of(labels)[2]["note"] == "half a thought"
        press(bob, "2 3 n")
        bob.keyboard.type("kept")
        bob.reload()  # closing the browser, before anything is submitted
        done(bob, 1, 6)
        expect(bob.locator("#note")).to_have_value("kept")
        assert bob.locator(".card button[aria-pressed=true]").all_text_contents() == ["2", "3"]
        other = opened(link, "Bob")  # another browser goes on where he stopped
        done(other, 1, 6)
        server.send_signal(signal.SIGINT)
        assert server.stdout is not None
        assert server.stdout.read().strip() == f"1 judgements, 3 in all in {labels}"
        assert server.wait() == 0 and server.stderr is not None
        (said,) = server.stderr.read().splitlines()
        assert said.startswith(f"{labels} was in use by process ") and said.endswith("taken over.")
    assert len({(row["id"], row["labeler"]) for row in rows_of(labels)}) == 3


def test_hostile_responses_are_text(tmp_path: Path, opened: Callable[[str, str], Page]) -> None:
    texts = [*HOSTILE.values(), *ODD]
    rows = [{"id": f"<b>{n}</b>", "prompt": text, "responses": [text, "plain"]} for n, text in enumerate(texts)]
    samples = write(tmp_path / "samples.jsonl", rows)
    with serving(samples, guidelines="".join(HOSTILE.values())) as link:
        page = opened(link, "Ann")
        alarms: list[str] = []
        page.on("dialog", lambda dialog: alarms.append(dialog.message))
        page.on("request", lambda request: alarms.append(request.url) if "127.0.0.1:9/" in request.url else None)
        page.on("console", lambda message: alarms.append(message.text))
        page.on("framenavigated", lambda frame: alarms.append(frame.url))
        seen = set()
        for count in range(len(texts)):
            done(page, count, len(texts))
            (found,) = [text for text in shown(page) if text != "plain"]
            assert page.locator("#prompt .text").text_content() == found
            seen.add(found)
            assert page.locator("#work").locator("script, img, svg, a, iframe, style, link, meta, details").count() == 0
            assert page.title() == f"Label: {count} of {len(texts)}"
            width = page.evaluate("() => document.documentElement.scrollWidth - innerWidth")
            assert width <= 0  # nothing pushes the page apart
            press(page, "1 Enter")
        done(page, len(texts), len(texts))
        assert alarms == []
    assert seen == {*HOSTILE.values(), *ODD.values()}
    written = rows_of(tmp_path / "labels.jsonl")
    assert {row["responses"][0] for row in written} == set(texts)
    assert page.locator("#guidelines .text").text_content() == "".join(HOSTILE.values())


def test_the_page_fits_a_phone_and_the_dark(tmp_path: Path, browser: Browser) -> None:
    with serving(write_samples(tmp_path, 2, k=9), guidelines="G " * 500) as link:
        context = browser.new_context(viewport={"width": 360, "height": 640}, color_scheme="dark")
        page = context.new_page()
        page.goto(link)
        press(page, "A Enter")
        expect(page.locator(".card")).to_have_count(9)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
        dark = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        assert max(map(int, re.findall(r"\d+", dark)[:3])) < 64
        expect(page.locator("#guidelines")).to_be_hidden()
        page.get_by_role("button", name="Response I: rank 9").click()
        expect(page.locator(".card").nth(8)).to_have_attribute("aria-label", "Response I, rank 9")
        context.close()


WORK = """async count => {
  const shown = document.getElementById("count"), seconds = [];
  for (let judged = 1; judged <= count; judged++) {
    const start = performance.now();
    const next = new Promise(resolve => new MutationObserver(resolve).observe(shown, {childList: true}));
    for (const key of ["2", "1", "4", "3", "Enter"])
      document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
    await next;
    if (!shown.textContent.startsWith(`${judged} of ${count}`)) throw new Error(shown.textContent);
    seconds.push(performance.now() - start);
  }
  return seconds;
}"""


@pytest.mark.long
def test_500_samples_do_not_slow_it_down(tmp_path: Path, opened: Callable[[str, str], Page]) -> None:
    count = 500
    with serving(write_samples(tmp_path, count, k=4)) as link:
        seconds = opened(link, "Ann").evaluate(WORK, count)
    rows = rows_of(tmp_path / "labels.jsonl")
    assert len({row["id"] for row in rows}) == len(rows) == count
    assert all([row["ranking"][index] for index in row["order"]] == [2, 1, 4, 3] for row in rows)
    assert median(seconds[-100:]) < 3 * median(seconds[:100]), (seconds[:100], seconds[-100:])
