"""How a GPU's minutes are spent: parts in their order, what is left out, what fails, what is kept; and the table."""

import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT
from support.small import small_base

sys.path.insert(0, str(Path(__file__).parent))
gpu = importlib.import_module("gpu")

SAY = "import json, sys, time, subprocess; say = lambda **r: print('@result ' + json.dumps(r), flush=True); "
PROCESSES = {
    "good": "say(x=1.5); print('noise'); say(x=2.5)",
    "bad": "say(x=3); raise ValueError('too bad')",
    # It has begun a process that holds its output.
    "slow": "say(x=4); subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])",
    "last": "say(x=5)",
}


def part(name: str, seconds: float = 0.0, lacks: str = "") -> Any:
    return gpu.Part(name, seconds, lambda given: None, lambda given: lacks)


def test_parts_go_on_where_one_fails_hangs_lacks_or_comes_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PATIENCE", 10)
    chosen = [part("good", 2), part("bad", 2), part("absent", 2, "no --model"), part("late", 600), part("slow", 0.05)]
    kept: list[str] = []
    start = time.monotonic()
    report = gpu.conduct(
        [*chosen, part("last", 2)],
        argparse.Namespace(minutes=1, small=False),
        lambda part: [sys.executable, "-c", SAY + PROCESSES[part.name]],
        lambda report: kept.append(json.dumps(report)),
    )
    assert time.monotonic() - start < 30
    assert all(outcome.pop("seconds", 0) >= 0 for outcome in report.values())
    assert report["good"] == {"results": [{"x": 1.5}, {"x": 2.5}]}
    assert report["bad"] == {"results": [{"x": 3}], "failed": "exit code 1: ValueError: too bad"}
    assert report["absent"] == {"results": [], "skipped": "no --model"}
    assert report["late"]["skipped"].startswith("takes 600 s, and ")
    assert report["slow"]["failed"] == "not done after 0 s"
    assert report["last"] == {"results": [{"x": 5}]} and list(report)[-1] == "last"
    first = json.loads(kept[0])
    assert first == {"good": {"results": [{"x": 1.5}]}}  # what a run keeps that is ended there
    assert len(kept) == sum(len(outcome["results"]) for outcome in report.values()) + len(report)


def begin(code: str) -> tuple[Any, dict[str, Any], int]:
    """A part that begins a process without its output, and then does what the code says: it, its outcome, the other."""
    sleeper = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], stdout=subprocess.DEVNULL).pid"
    process = gpu.run([sys.executable, "-c", f"{SAY} say(pid={sleeper}); {code}"], 60, outcome := {})
    return process, outcome, next(process)["pid"]


def is_gone(pid: int) -> bool:
    """Whether a process ends within ten seconds; one that nobody has waited for has ended."""
    for _ in range(1000):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


def test_a_conductor_that_is_ended_ends_its_part_and_what_that_has_begun() -> None:
    process, outcome, begun = begin("time.sleep(60)")
    process.close()
    assert outcome["failed"] == "interrupted" and is_gone(begun)


def test_a_part_that_crashes_leaves_nothing_on_the_gpu() -> None:
    process, outcome, begun = begin("import os; os.abort()")
    assert list(process) == [] and outcome["failed"].startswith("exit code -6") and is_gone(begun)


def test_the_table_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"above\n{gpu.MARKS[0]}old\n{gpu.MARKS[1]}below\n")
    rows = [{"": "16 rows", "ms a token": 8.1234, "of the limit": 0.271, "by": "graph"}]
    rows += [{"": "32 rows", "ms a token": 12345.6, "of the limit": 1.0, "by": "graph"}, {"kernels": 40}]
    report = {
        "decode": {"results": rows, "seconds": 12.3},
        "trl": {"results": [], "skipped": "no TRL 1.12"},
        "model": {"results": [], "seconds": 1.0, "failed": "exit code 1"},
    }
    gpu.write_table(report, page)
    text = page.read_text()
    assert text.startswith(f"above\n{gpu.MARKS[0]}") and text.endswith(f"{gpu.MARKS[1]}below\n") and "old" not in text
    assert "|  | ms a token | of the limit | by |\n|---|---|---|---|\n| 16 rows | 8.12 | 27.1% | graph |\n" in text
    assert "| 32 rows | 12,346 | 100.0% | graph |" in text and "| kernels |\n|---|\n| 40 |" in text
    assert "**trl** skipped: no TRL 1.12" in text and "**model** (1 s) failed: exit code 1" in text
    gpu.write_table(report, page)
    assert page.read_text() == text
    assert all(gpu.README.read_text().count(mark) == 1 for mark in gpu.MARKS)


def test_the_most_valuable_parts_come_first() -> None:
    names = [part.name for part in gpu.parts()]
    assert len(set(names)) == len(names)
    order = ["machine", "tests", "exact", "decode", "update", "trl", "tiny", "model", "peaks", "products", "vllm"]
    assert list(dict.fromkeys(name.split()[0] for name in names)) == order
    marked = {path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()}
    assert {ROOT / file for file in gpu.gpu_tests()} == marked - {Path(__file__)}


def run_small(folder: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "tests/benchmarks/gpu.py"), "--small", f"--json={folder}/gpu.json", *options]
    subprocess.run(command, check=True, timeout=1800, cwd=folder)
    return json.loads((folder / "gpu.json").read_text())


@pytest.mark.long
def test_all_parts_run_small(tmp_path: Path) -> None:
    report = run_small(tmp_path, "--minutes=40", f"--model={small_base()}")
    assert {name: outcome["failed"] for name, outcome in report.items() if "failed" in outcome} == {}
    skipped = {name for name, outcome in report.items() if "skipped" in outcome}
    may = {"trl", "model smollm2-sentiment", "model smollm2-hh", "products", "vllm"}
    assert skipped <= may  # where ../shared or VADER is absent, or there is no GPU
    assert all(outcome["results"] for name, outcome in report.items() if name not in skipped)
    exact = [row for name, outcome in report.items() if name.startswith("exact") for row in outcome["results"]]
    assert len(exact) == 2 * 4 and all(row["largest log-ratio, first pass"] == 0 for row in exact)
