"""Fifty people on the page at once, for a while: no judgement that the server has confirmed is lost, whatever happens.

The while is 20 seconds; `SECONDS_OF_LABELING=600 pytest -s -m long tests/feedback/test_label_load.py` makes it ten
minutes, and prints how long the answers took.
"""

import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.command_line import start
from support.label_page import Client

LABELERS, SAMPLES, OVERLAP, KILLS = 50, 4_000, 0.01, 3
SECONDS = float(os.environ.get("SECONDS_OF_LABELING", "20"))
THINKS = SECONDS / 20  # seconds that a labeler takes at most, so that there are samples to the end


class Server:
    """`rlhf-recipes label` in a process of its own, at one port whenever it is started."""

    def __init__(self, samples: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = ["-m", "rlhf_recipes", "label", str(samples), "--port", str(port), "--overlap", str(OVERLAP)]
        self.command, self.said = [sys.executable, *words], samples.with_name("said.txt")
        self.start()

    def start(self) -> None:
        with self.said.open("a") as said:
            self.process = start(self.command, stdout=subprocess.PIPE, stderr=said)
        assert self.process.stdout is not None
        line = ""
        while not line.startswith("Open "):
            line = self.process.stdout.readline()
            assert line, "the server has ended"
        self.link = line.split()[1]

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Labeler(threading.Thread):
    """Judges what is before him until the time is over; some judgements are sent twice, and some are cut in two."""

    def __init__(self, name: str, server: Server, until: float) -> None:
        super().__init__(name=name)
        self.client, self.until, self.draw = Client(server.link, server.link.split("=")[1]), until, random.Random(name)
        self.confirmed: list[str] = []  # ids
        self.seconds: list[float] = []  # of each answer
        self.refused = Counter[int]()

    def ask(self, action: str, **sent: Any) -> dict[str, Any] | None:
        """What the page would do: again while the server is away. None: what was sent is refused."""
        while True:
            begun = time.monotonic()
            try:
                status, answer = self.client.post(f"/{action}", {"labeler": self.name, **sent})
            except OSError:
                time.sleep(0.2)
                continue
            if status != 200:
                self.refused[status] += 1
                return None
            self.seconds.append(time.monotonic() - begun)
            return answer

    def run(self) -> None:
        state = self.ask("start")
        while state is not None and state["item"] and time.monotonic() < self.until:
            time.sleep(self.draw.uniform(0, THINKS))
            item = state["item"]
            judgement = {"id": item["id"], "ranking": [*range(1, len(item["responses"]) + 1)]}
            judgement |= {"seconds": 1.0, "note": "", "flag": False}
            if self.draw.random() < 0.02:
                self.break_off(judgement)
            answer = self.ask("judge", **judgement)
            if answer is not None:
                self.confirmed.append(item["id"])
                if self.draw.random() < 0.05:
                    answer = self.ask("judge", **judgement)
            state = answer or self.ask("start")

    def break_off(self, judgement: dict[str, Any]) -> None:
        """Send half of a judgement, keep the server waiting, and go away."""
        body = json.dumps({"labeler": self.name, **judgement})
        host, port = self.client.host.split(":")
        head = f"POST /judge HTTP/1.1\r\nHost: {self.client.host}\r\nCookie: {self.client.cookie}\r\n"
        head += f"Origin: http://{self.client.host}\r\nContent-Type: application/json\r\n"
        try:
            with socket.create_connection((host, int(port)), timeout=5) as broken:
                broken.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body[: len(body) // 2]}".encode())
                time.sleep(self.draw.uniform(0, 2))
        except OSError:
            pass  # the server is away


@pytest.mark.long
def test_fifty_labelers_lose_nothing(tmp_path: Path) -> None:
    samples = tmp_path / "samples.jsonl"
    with samples.open("w") as rows:
        for number in range(SAMPLES):
            row = {"id": f"s{number}", "prompt": f"Prompt {number}", "responses": [f"{number}.{i}" for i in range(3)]}
            rows.write(json.dumps(row) + "\n")
    server = Server(samples)
    labelers = [Labeler(f"labeler {number}", server, time.monotonic() + SECONDS) for number in range(LABELERS)]
    try:
        for labeler in labelers:
            labeler.start()
        for _ in range(KILLS):
            time.sleep(SECONDS / (KILLS + 1))
            server.kill()
            server.start()
        for labeler in labelers:
            labeler.join(timeout=SECONDS + 60)
            assert not labeler.is_alive()
    finally:
        server.kill()
    labels = [json.loads(line) for line in (tmp_path / "samples.labels.jsonl").read_text().splitlines()]
    written = Counter((row["labeler"], row["id"]) for row in labels)
    confirmed = {(labeler.name, id) for labeler in labelers for id in labeler.confirmed}
    assert set(written.values()) == {1} and confirmed <= set(written)
    # What was written as the server was killed, before it could say so, is there as well: one a kill and labeler.
    assert len(set(written) - confirmed) <= KILLS * LABELERS
    alone = [size for size in Counter(row["id"] for row in labels).values() if size > 1]
    assert len(alone) <= OVERLAP * SAMPLES + 1, "what goes to one labeler was judged by one"
    assert "Traceback" not in server.said.read_text(), server.said.read_text()
    refused = sum((labeler.refused for labeler in labelers), Counter())
    assert set(refused) <= {409}, "somebody else had it, because the server that knew was killed"
    seconds = sorted(second for labeler in labelers for second in labeler.seconds)
    print(
        f"\n{len(labels):,} judgements of {LABELERS} in {SECONDS:.0f} s among {SAMPLES:,} samples, {KILLS} kills, "
        f"{sum(refused.values())} refused; an answer took {1000 * statistics.median(seconds):.0f} ms (median), "
        f"{1000 * seconds[int(0.99 * len(seconds))]:.0f} ms (99 %)"
    )
