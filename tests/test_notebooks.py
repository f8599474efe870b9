"""Every notebook runs from top to bottom, in a small setting, and holds no stale output."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
from support.small import small_base

NOTEBOOKS = {path.stem: path for path in sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))}
SMALL = {
    '"limit": 1000': '"limit": 160',
    '"limit": 300': '"limit": 120',
    '"total_episodes": 2560': '"total_episodes": 128',
    '"heldout_limit": 64': '"heldout_limit": 16',
    '"eval_steps": 4': '"eval_steps": 1',
    '"save_steps": 4': '"save_steps": 1',
    "tiny.demonstrations(400)": "tiny.demonstrations(120)",
    "tiny.prompts(500)": "tiny.prompts(120)",
    "tiny.comparisons(1500)": "tiny.comparisons(160)",
    "ppo.total_episodes=1280": "ppo.total_episodes=128",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder beside which the notebooks' runs go, that share a base."""
    folder = tmp_path_factory.mktemp("notebooks")
    (folder / "notebooks").mkdir()
    return folder


def execute(names: Iterable[str], place: Path, small: bool = True) -> dict[str, tuple[list[Any], str]]:
    """Each notebook's cells after it ran, and all its text output.

    They run one after another in one kernel, which forgets all names in between but keeps the libraries: importing
    them takes as long as a small notebook.

    Args:
        small: with the test's base and for a few updates, not as they stand.
    """
    parts = {name: nbformat.read(NOTEBOOKS[name], as_version=4).cells for name in names}
    whole = nbformat.v4.new_notebook()
    small_tiny = f'replace(load("tiny"), base={{"model": {small_base()!r}}}, ppo={{"response_length": 12}})'
    for name, cells in parts.items():
        cells = parts[name] = [cell for cell in cells if cell.cell_type == "code"]
        assert not any(cell.outputs or cell.execution_count for cell in cells)
        for cell in cells if small else ():
            base = {'load("tiny").base.model': repr(small_base())}
            for full, less in {**base, 'load("tiny")': small_tiny, **SMALL}.items():
                cell.source = cell.source.replace(full, less)
        whole.cells += [*cells, nbformat.v4.new_code_cell("%reset -f")]
    where = {"metadata": {"path": str(place / "notebooks")}}
    nbclient.NotebookClient(whole, timeout=300 if small else 1800, resources=where).execute()
    return {name: (cells, text_of(cells)) for name, cells in parts.items()}


def text_of(cells: list[Any]) -> str:
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


@pytest.fixture(scope="module")
def executed(place: Path) -> dict[str, tuple[list[Any], str]]:
    return execute(NOTEBOOKS, place)


def pictures(cells: list[Any]) -> int:
    return sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)


def summary(place: Path, name: str) -> dict[str, Any]:
    return json.loads((place / "runs" / name / "summary.json").read_text())


def test_every_notebook_is_tested_and_starts_with_its_installation() -> None:
    names = "1_run_a_recipe 2_adapt_a_recipe 3_inside_ppo 4_read_a_run 5_ship_it 6_your_own_data"
    assert [*NOTEBOOKS] == names.split()
    for path in NOTEBOOKS.values():
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        first = next(cell for cell in notebook.cells if cell.cell_type == "code")
        assert "%pip install" in first.source and "find_spec" in first.source


def test_run_a_recipe(executed: dict[str, tuple[list[Any], str]], place: Path) -> None:
    cells, text = executed["1_run_a_recipe"]
    assert "Did you mean tracker?" in text
    assert f"{summary(place, 'notebook-1')['win_rate_vs_sft']['rate']:.1%}" in text.replace(" %", "%")
    assert pictures(cells) == 1


def test_adapt_a_recipe(executed: dict[str, tuple[list[Any], str]], place: Path) -> None:
    cells, text = executed["2_adapt_a_recipe"]
    assert "polite" in text and "words" in text
    shown = [output.get("data", {}).get("text/html", "") for cell in cells for output in cell.outputs]
    (frame,) = (page for page in shown if "<iframe sandbox srcdoc=" in page)
    assert "Reward" in frame and "wins against SFT" in frame and "&lt;script" not in frame, "the run as it ended"
    metrics = [json.loads(line) for line in (place / "runs/notebook-2/metrics.jsonl").read_text().splitlines()]
    assert any("rewards/is_short/mean" in row and "rewards/reward_model/mean" in row for row in metrics)
    assert summary(place, "notebook-2")["reward_model_accuracy"] > 0.9, "that politeness is liked is easily learned"


def test_inside_ppo(executed: dict[str, tuple[list[Any], str]], place: Path) -> None:
    cells, _ = executed["3_inside_ppo"]
    at_start, later = eval(cells[4].outputs[-1]["data"]["text/plain"])
    assert at_start == 0 and later != 0
    drawn = [
        output["data"]["text/html"]
        for cell in cells
        for output in cell.outputs
        if "text/html" in output.get("data", {})
    ]
    assert sum("<span title=" in page for page in drawn) == 2
    lines = cells[-1].outputs[-1]["data"]["text/plain"].splitlines()[1:]
    steps = [[float(number) for number in line.split()[1:]] for line in lines]  # ratio, policy loss, value loss
    assert steps[0][0] == pytest.approx(1, abs=1e-5)
    assert steps[-1][1] < steps[0][1], "the policy loss falls"
    assert steps[-1][2] < steps[0][2], "and so does the value loss"


def test_read_a_run(executed: dict[str, tuple[list[Any], str]], place: Path) -> None:
    cells, text = executed["4_read_a_run"]
    assert pictures(cells) == 2
    assert "True" in text, "a best checkpoint is marked"
    assert {"notebook-1", "notebook-4", "notebook-4.html"} <= {path.name for path in (place / "runs").iterdir()}
    evaluation = json.loads((place / "runs/notebook-4/evaluation/evaluation.json").read_text())
    assert {"sft", "ppo/checkpoint-1"} <= evaluation["models"].keys(), "checkpoints are compared"
    assert any("notebook-1" in name for name in evaluation["models"]), "and another run's policy"


def test_ship_it(executed: dict[str, tuple[list[Any], str]], place: Path) -> None:
    cells, text = executed["5_ship_it"]
    measured = {
        name: json.loads((place / "runs/notebook-5" / name / "export.json").read_text())["measured"]
        for name in ("float32", "bfloat16")
    }
    assert measured["float32"]["mean_difference"] < 1e-5 < measured["bfloat16"]["mean_difference"]
    assert "held-out prompts" in text and text_of(cells[-2:-1]).strip(), "what it says elsewhere"
    rows = cells[-1].outputs[-1]["data"]["text/plain"].splitlines()[1:]
    assert len({float(row.split()[-1]) for row in rows}) == 3, "three answers, three scores"


def test_your_own_data(executed: dict[str, tuple[list[Any], str]], place: Path) -> None:
    cells, text = executed["6_your_own_data"]
    assert "'better' is the chosen" in text and "chat=True" in text, "what `new` made of the files"
    run = place / "runs/notebook-6/runs/my-assistant"
    evaluation = json.loads((run / "evaluation/evaluation.json").read_text())
    assert "people" in evaluation["judges"] and "reward" in evaluation["people"]["agreement"]
    assert {win["judge"] for win in evaluation["wins"]} == {"reward", "people"}
    assert "What people say" in (run / "report.html").read_text()
    assert "people" in cells[-1].outputs[-1]["data"]["text/plain"]


@pytest.mark.long
def test_the_notebooks_run_as_they_stand(tmp_path: Path) -> None:
    (tmp_path / "notebooks").mkdir()
    execute(NOTEBOOKS, tmp_path, small=False)
    gold = {number: summary(tmp_path, f"notebook-{number}")["gold_score"] for number in (1, 2, 4)}
    assert gold[1]["ppo"] > gold[1]["sft"] and gold[2]["ppo"] > gold[2]["sft"]
    assert gold[4]["ppo"] < gold[1]["ppo"], "without a KL penalty the reward model is gamed, as the notebook shows"
