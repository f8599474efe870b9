"""Files of rows, and what stands beside them, that nobody wrote so."""

from pathlib import Path

import pytest

from rlhf_recipes import Base, Recipe
from rlhf_recipes.records.folder import write_recipe
from rlhf_recipes.records.progress import read_progress
from rlhf_recipes.records.recorder import drop_rows_to_come_again
from rlhf_recipes.report.gather import gather


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_row_of_no_stage_is_named(tmp_path: Path, name: str) -> None:
    write_recipe(tmp_path, Recipe("any", Base("any")))
    (tmp_path / name).write_text('{"stage": "sft", "step": 1}\n{}\n')
    with pytest.raises(ValueError, match=rf"{name}, row 2: it has no stage or no step"):
        drop_rows_to_come_again(tmp_path / name, "sft", 1)
    with pytest.raises(ValueError, match=rf"{name}, row 2: it has no stage or no step"):
        gather([tmp_path])


@pytest.mark.parametrize("text", ["{}", "[]", "null"])
def test_progress_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "progress.json").write_text(text)
    with pytest.raises(ValueError, match=r"progress\.json.* not what this package writes"):
        read_progress(tmp_path)
