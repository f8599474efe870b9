"""The cell of a notebook that shows a run. A real notebook's is in `tests/test_notebooks.py`."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import IPython.display
import pytest
from support.report_run import measured, write_run
from transformers import TrainerState

from rlhf_recipes.pipeline import notebook
from rlhf_recipes.pipeline.notebook import ShowInNotebook, in_notebook
from rlhf_recipes.report.cell import render_cell
from rlhf_recipes.report.gather import gather


def test_the_cell_is_drawn_again_when_it_has_rested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, shown = write_run(tmp_path / "run"), []

    def display(page: Any, display_id: bool) -> Any:
        shown.append(page.data)
        return SimpleNamespace(update=lambda page: shown.append(page.data))

    monkeypatch.setattr(IPython.display, "display", display)
    cell = ShowInNotebook(folder)
    start = time.monotonic()
    cell.on_log(None, TrainerState(), None)
    took = time.monotonic() - start
    assert 50 * took < cell.rested - time.monotonic() < 100 * took, "under 1 % of the run's time"
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"stage": "ppo", "step": 41, **measured(77.0)}) + "\n")
    cell.on_log(None, TrainerState(), None)
    assert len(shown) == 1
    cell.rested = 0.0
    cell.on_log(None, TrainerState(is_world_process_zero=False), None)
    assert len(shown) == 1, "the main process draws"
    cell.on_log(None, TrainerState(), None)
    assert len(shown) == 2 and "to 77" in shown[1] and "to 77" not in shown[0]
    assert all(page.startswith("<div><iframe sandbox srcdoc=") and "<script" not in page for page in shown)


def test_the_cell_says_how_far_the_run_is_and_what_it_answers(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", said={0: "<b>bold</b>", 1: "x" * 500})
    page = render_cell(gather([folder]))
    assert "wins against SFT" in page and page.count("<figure>") == 3 and "<nav" not in page and "<script" not in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page and "x" * 160 + "…" in page and "x" * 161 not in page
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["stages"]["ppo"]["state"] = "running"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    far = {"stage": "ppo", "round": 1, "step": 40, "steps": 80, "seconds": [60, 60], "then": ["dpo"]}
    (folder / "progress.json").write_text(json.dumps(far))
    page = render_cell(gather([folder]))
    assert "<span>about 1 min left, then dpo</span>" in page and "wins against SFT" not in page


def test_outside_of_a_notebook_there_is_no_cell() -> None:
    assert not in_notebook()


@pytest.mark.parametrize("shell", [None, SimpleNamespace(), SimpleNamespace(kernel=object())])
def test_a_notebook_is_told_from_a_terminal(monkeypatch: pytest.MonkeyPatch, shell: Any) -> None:
    monkeypatch.setitem(notebook.sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert in_notebook() == hasattr(shell, "kernel")
