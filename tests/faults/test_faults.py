"""A small part of `make faults`: what some writes leave, and one more start."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from faults.states import States
from faults.work import WORK, begin, contents, differences, make_inputs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    make_inputs(folder / "inputs")
    return folder


@pytest.mark.parametrize(("name", "count"), [("sft", 1), ("judge", 5), ("critique", 5)])
def test_work_goes_on_from_what_its_writes_leave_to_the_same_end(root: Path, name: str, count: int) -> None:
    place = begin(root, name)
    states = States(place, root / "copies" / name)
    states.copies.mkdir(parents=True)
    with states.watching():
        WORK[name].do(root / "inputs", place)
    whole = contents(place)
    for state in random.Random(0).sample(list(states), count):
        shutil.rmtree(place)
        shutil.copytree(state, place)
        WORK[name].do(root / "inputs", place)
        assert differences(contents(place), whole) == [], state.name


def test_each_write_leaves_a_torn_state_and_a_whole_one(tmp_path: Path) -> None:
    folder, states = tmp_path / "folder", States(tmp_path / "folder", tmp_path / "copies")
    folder.mkdir()
    states.copies.mkdir()
    with states.watching():
        (folder / "a.json").write_text('{"a": 1}')
        with (folder / "a.json").open("a") as stream:
            stream.write(" " * 100)
        torch.save([1], folder / "b.pt")
        os.replace(folder / "a.json", folder / "c.json")
        (folder / "b.pt").unlink()
        (tmp_path / "elsewhere").write_text("a")
    names = [path.name for path in states]
    assert [name.split(" ", 1)[1] for name in names] == [
        *("after a.json", "torn a.json", "after a.json", "torn a.json", "after b.pt", "torn b.pt"),
        *("after c.json", "after b.pt"),
    ]
    sizes = [path.stat().st_size for name in names[:4] for path in [states.copies / name / "a.json"]]
    assert sizes[0] == 8 > sizes[1] and sizes[2] == 108 > sizes[3] >= 8
    assert not (states.copies / names[-1] / "b.pt").exists()


def test_what_differs_is_said(tmp_path: Path) -> None:
    for name, row in (("a", {"loss": 1.0, "seconds": 3, "steps": [1, 2]}), ("b", {"loss": 1.0, "steps": [1, 3]})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "b" / "left.txt").write_text("")
    found = differences(contents(tmp_path / "b"), contents(tmp_path / "a"))
    assert found == ["left.txt is left over", "rows.jsonl differs at [0].steps[1]: 3 and not 2"]
