"""Every notebook runs from top to bottom, in a small setting, and holds no stale output."""

from pathlib import Path

import nbclient
import nbformat
import pytest

from rlhf_recipes.tiny import build_base

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_holds_no_output(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)

    build_base(tmp_path / "base", steps=20)
    for cell in cells:  # the same recipe on a base that took seconds, for a few updates
        small = f'replace(load("tiny"), base={{"model": {str(tmp_path / "base")!r}}})'
        cell.source = cell.source.replace('load("tiny")', small).replace(
            '"total_episodes": 640', '"total_episodes": 256'
        )
    (tmp_path / "notebooks").mkdir()
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path / "notebooks")}}
    ).execute()
    assert "win_rate_vs_sft" in (tmp_path / "runs/notebook-1/summary.json").read_text()
