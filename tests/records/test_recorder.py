"""Files of rows, and what stands beside them, that nobody wrote so."""

from pathlib import Path

import pytest

from rlhf_recipes import Base, Recipe
from rlhf_recipes.records.folder import write_recipe
from rlhf_recipes.records.progress import read_progress
from rlhf_recipes.records.recorder import drop_rows_to_come_again
from rlhf_recipes.report.gather import gather


@pytest.mark.parametrize(
    ("name", "row", "wrong"),
    [
        ("metrics.jsonl", "{}", "stage"),
        ("metrics.jsonl", '{"stage": ["sft"], "step": 1}', "stage"),
        ("metrics.jsonl", '{"stage": "sft", "step": null}', "step"),
        ("samples.jsonl", "{}", "stage"),
        ("samples.jsonl", '{"stage": "ppo", "step": 1, "prompt": "w5", "completion": "w6"}', "model"),
        (
            "samples.jsonl",
            '{"stage": "ppo", "step": 1, "model": "ppo", "prompt": "w5", "completion": []}',
            "completion",
        ),
    ],
)
def test_a_row_of_no_stage_is_named(tmp_path: Path, name: str, row: str, wrong: str) -> None:
    write_recipe(tmp_path, Recipe("any", Base("any")))
    good = '{"stage": "sft", "step": 1, "model": "sft", "prompt": "w5", "completion": "w6"}'
    (tmp_path / name).write_text(f"{good}\n{row}\n")
    for read in (lambda: drop_rows_to_come_again(tmp_path / name, "sft", 1), lambda: gather([tmp_path])):
        with pytest.raises(ValueError, match=rf"{name}, row 2: it has no {wrong}, or a wrong one"):
            read()


@pytest.mark.parametrize("text", ["{}", "[]", "null"])
def test_progress_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "progress.json").write_text(text)
    with pytest.raises(ValueError, match=r"progress\.json.* not what this package writes"):
        read_progress(tmp_path)
