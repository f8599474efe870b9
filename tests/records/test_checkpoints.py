"""Checkpoints that the disk has damaged."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_recipes.records.checkpoints import SEAL, last_checkpoint, seal
from rlhf_recipes.records.folder import newest_round_first


def make_checkpoints(folder: Path) -> list[Path]:
    made = [folder / f"checkpoint-{step}" for step in (9, 10)]
    for checkpoint in made:
        (checkpoint / "policy").mkdir(parents=True)
        (checkpoint / "policy" / "adapter_model.safetensors").write_bytes(bytes(range(256)))
        (checkpoint / "optimizer.pt").write_bytes(b"momentum")
        (checkpoint / "trainer_state.json").write_text("{}")
        seal(checkpoint)
    return made


@pytest.mark.parametrize(
    ("name", "damage", "why"),
    [
        ("optimizer.pt", Path.unlink, "optimizer.pt is missing"),
        ("optimizer.pt", lambda path: path.write_bytes(b""), "optimizer.pt is not what was written"),
        (
            "policy/adapter_model.safetensors",
            lambda path: path.write_bytes(bytes(256)),
            "policy/adapter_model.safetensors is not what was written",
        ),
        (SEAL, lambda path: path.write_bytes(bytes(100)), f"{SEAL} is not JSON"),
        (SEAL, lambda path: path.write_text("[" * 100_000), f"{SEAL} is not JSON"),
        ("optimizer.pt", lambda path: (path.unlink(), path.mkdir()), "optimizer.pt is missing"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], object], why: str
) -> None:
    older, newest = make_checkpoints(tmp_path)
    assert last_checkpoint(tmp_path) == str(newest) and not caplog.messages
    damage(newest / name)
    assert last_checkpoint(tmp_path) == str(older) and not newest.exists()
    damage(older / name)
    assert last_checkpoint(tmp_path) is None
    assert caplog.messages == [
        f"{newest} was damaged and is deleted ({why}): the stage goes on from checkpoint-9.",
        f"{older} was damaged and is deleted ({why}): the stage begins at its start.",
    ]


def test_a_checkpoint_without_a_seal_is_gone_on_from_and_sealed_once(tmp_path: Path) -> None:
    older, newest = make_checkpoints(tmp_path)
    for checkpoint in (older, newest):
        (checkpoint / SEAL).unlink()  # an earlier version wrote none
    assert last_checkpoint(tmp_path) == str(newest)
    seal(newest)
    (newest / "optimizer.pt").write_bytes(b"")
    seal(newest)
    assert json.loads((newest / SEAL).read_text()).keys() == {
        *("optimizer.pt", "policy/adapter_model.safetensors", "trainer_state.json")
    }
    assert last_checkpoint(tmp_path) != str(newest)


def test_one_without_a_seal_does_not_take_the_place_of_a_whole_one_that_has_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newest = make_checkpoints(tmp_path)
    (newest / SEAL).unlink()  # a power cut came before it
    (newest / "optimizer.pt").write_bytes(b"")  # and tore what was not on disk
    assert last_checkpoint(tmp_path) == str(older) and older.is_dir() and not newest.exists()
    assert caplog.messages == [
        f"{newest} was damaged and is deleted (no {SEAL} says what it holds): the stage goes on from checkpoint-9."
    ]


def test_one_without_a_seal_is_better_than_a_damaged_one_that_has_it(tmp_path: Path) -> None:
    older, newest = make_checkpoints(tmp_path)
    (newest / SEAL).unlink()
    (older / "optimizer.pt").write_bytes(b"")
    assert last_checkpoint(tmp_path) == str(newest)


def test_what_is_no_folder_is_no_checkpoint_and_no_round(tmp_path: Path) -> None:
    _, newest = make_checkpoints(tmp_path)
    for name in ("checkpoint-20", "round-2"):
        (tmp_path / name).write_text("no folder")
        (tmp_path / f"{name}1").symlink_to(tmp_path / "nowhere")
    assert last_checkpoint(tmp_path) == str(newest)
    assert newest_round_first(tmp_path) == [tmp_path]
    (newest / SEAL).unlink()
    (newest / "trainer_state.json").write_text("[" * 100_000)
    assert Path(last_checkpoint(tmp_path) or "").name == "checkpoint-9"
