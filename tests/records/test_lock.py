"""One process at a time in a folder or at a file: who holds it is named, and a killed process holds nothing."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from threading import Timer

import pytest
from filelock import FileLock
from support.paths import ROOT

from rlhf_recipes.records.lock import held
from rlhf_recipes.stages.stop import StopInOrder, Stopped

HOLD = "import sys, time, pathlib; from rlhf_recipes.records.lock import held\n"
HOLD += "with held(pathlib.Path(sys.argv[1])): print(flush=True), time.sleep(60)"


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process, which holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def test_the_process_that_holds_a_folder_is_named_and_a_killed_one_holds_nothing(
    other: subprocess.Popen[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = rf"{tmp_path} is in use by process {other.pid} of \S+ on \S+, since \d{{4}}-\d\d-\d\dT\S+\. Let it end"
    with pytest.raises(ValueError, match=message), held(tmp_path):
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    with held(tmp_path):
        assert f'"process": {os.getpid()}' in (tmp_path / ".lock.owner.json").read_text()
    assert not (tmp_path / ".lock.owner.json").exists()
    taken = rf"{tmp_path} was in use by process {other.pid} of \S+ on \S+, since \d{{4}}\S+, which has ended without"
    assert re.match(taken, capsys.readouterr().err)
    with held(tmp_path):
        pass
    assert not capsys.readouterr().err, "who lets go leaves nothing to be said"


def test_a_holder_who_is_about_to_say_who_he_is_is_waited_for(tmp_path: Path) -> None:
    with held(tmp_path):
        owner = tmp_path / ".lock.owner.json"
        said = owner.read_text()
        owner.unlink()
        Timer(0.05, owner.write_text, [said]).start()
        with pytest.raises(ValueError, match=rf"{tmp_path} is in use by process {os.getpid()} of"), held(tmp_path):
            pass


@pytest.mark.parametrize("text", [None, "", '{"process": 1', "{}", "[]", "\x00\xff"])
def test_a_holder_who_has_not_said_who_he_is_holds_it_too(tmp_path: Path, text: str | None) -> None:
    with held(tmp_path):
        owner = tmp_path / ".lock.owner.json"
        owner.unlink()
        if text is not None:
            owner.write_text(text)
        with pytest.raises(ValueError, match=rf"{tmp_path} is in use by another process\. Let it end"), held(tmp_path):
            pass


def test_waiting_ends_by_the_clock_and_what_a_holder_says_does_nothing_to_a_terminal(
    other: subprocess.Popen[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {"process": "\x1b]0;owned\x07", "user": "u\nerror: forged", "host": "h", "since": "s"}
    (tmp_path / ".lock.owner.json").write_text(json.dumps(said))
    with pytest.raises(Stopped) as stopped, held(tmp_path, StopInOrder(datetime(2020, 1, 1)).check):
        pass
    assert stopped.value.code == 143
    printed = capsys.readouterr().err
    assert printed.endswith(r"process \x1b]0;owned\x07 of u\nerror: forged on h, since s. Waiting for it." + "\n")


def test_who_waits_comes_next(
    other: subprocess.Popen[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Timer(0.2, other.kill).start()
    with held(tmp_path, wait=lambda: None):
        assert other.wait(timeout=10) == -signal.SIGKILL
    assert f"in use by process {other.pid} of" in capsys.readouterr().err


def test_a_lock_is_not_taken_through_a_link(tmp_path: Path) -> None:
    letter = tmp_path / "letter"
    letter.write_text("Dear Ada")
    (tmp_path / ".lock").symlink_to(letter)
    with pytest.raises(ValueError, match=r"\.lock is a link, .*delete it"), held(tmp_path):
        pass
    with pytest.raises(OSError, match="symbolic link"):  # nor by filelock itself, should one be made in between
        FileLock(tmp_path / ".lock").acquire()
    assert letter.read_text() == "Dear Ada"


def test_a_thread_that_waits_hears_a_signal_as_the_others_do() -> None:
    stop = StopInOrder()
    stop.check()
    with stop.listening(), pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGTERM)
        stop.check()
    with pytest.raises(Stopped) as stopped:
        stop.check()
    assert stopped.value.code == 143


def test_a_file_is_held_beside_it_and_others_are_free(tmp_path: Path) -> None:
    labels, refused = tmp_path / "labels.jsonl", pytest.raises(ValueError, match=r"labels\.jsonl is in use by process")
    with held(labels), held(tmp_path / "other.jsonl"), held(tmp_path), refused, held(labels):
        pass
    with held(labels):
        pass


def test_two_names_of_a_file_have_one_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels, link, folder = tmp_path / "labels.jsonl", tmp_path / "link.jsonl", tmp_path / "folder"
    labels.touch()
    link.symlink_to(labels)
    folder.symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in (link, folder / "labels.jsonl", Path("labels.jsonl"), Path("folder", "link.jsonl")):
        refused = pytest.raises(ValueError, match=rf"{name} is in use by process {os.getpid()} of")
        with held(labels), refused, held(name):
            pass
        with held(name), pytest.raises(ValueError, match="in use"), held(labels):
            pass


def test_a_block_that_fails_lets_go(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), held(tmp_path):
        raise RuntimeError
    with held(tmp_path):
        pass
