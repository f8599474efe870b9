"""What a disk refuses is one sentence, whichever library has met it; all else stays what it is."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from support.command_line import error_of

from rlhf_recipes.records.files import Journal, beside, read_rows, write_text, writing_in
from rlhf_recipes.records.lock import held


def refusal(number: int, file: str = "file") -> OSError:
    return OSError(number, os.strerror(number), file)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (refusal(errno.ENOSPC), "file: the disk is full: make room"),
        (refusal(errno.EDQUOT), "file: the quota is used up: make room"),
        (refusal(errno.EROFS), "file: this disk can only be read: name a folder on another one"),
        (refusal(errno.EACCES), "file: its permissions forbid it: change them"),
        (refusal(errno.EIO), "file: the disk fails: name a folder on another one"),
        (refusal(errno.ENOENT, "gone/file"), "gone: it was deleted or moved while this ran: put it back"),
        (SafetensorError("I/O error: Disk quota exceeded (os error 122)"), "run: the quota is used up: make room"),
        (Exception("No space left on device (os error 28)"), "run: the disk is full"),  # tokenizers has no better one
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
            "run: it cannot be written: make room, or see to the quota",
        ),
    ],
)
def test_what_a_disk_refuses_is_said_in_words(error: Exception, words: str) -> None:
    with pytest.raises(ValueError) as raised, writing_in(Path("run")):
        raise error
    assert str(raised.value).startswith(words)
    assert str(raised.value).endswith(f"({error}). What is there is safe: then run the same again.")


def test_a_file_is_named_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=rf"^{tmp_path / 'gone'}: it was deleted"), writing_in(tmp_path):
        write_text(tmp_path / "gone" / "file", "text")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=rf"^{tmp_path / 'file'}: the disk is full"), writing_in(tmp_path):
        write_text(tmp_path / "file", "text")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(os, "unlink", lambda *words, **more: full(0))  # a disk that can only be read refuses that, too
    with pytest.raises(ValueError, match=rf"^{tmp_path / 'file'}: the disk is full"), writing_in(tmp_path):
        write_text(tmp_path / "file", "text")


def test_what_is_no_place_for_a_file_is_said_in_words(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for write, words in (
        (lambda: file.mkdir(), f"{file}: something else has this name"),
        (lambda: (file / "x").mkdir(), f"{file}: it is no folder"),
        (lambda: write_text(tmp_path, "text"), f"{tmp_path}: it is a folder, and no file"),
        (lambda: (tmp_path / ("a" * 300) / "x").mkdir(), f"{tmp_path / ('a' * 300)}: the name is too long"),
    ):
        with pytest.raises(ValueError) as raised, writing_in(Path()):
            write()
        assert str(raised.value).startswith(words)


def test_no_file_takes_the_place_of_a_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for write in (lambda path: write_text(path, "text"), Journal):
        with pytest.raises(ValueError, match="pipe: it is no file: name another"):
            write(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_a_file_of_other_rows_is_named(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"id": 1}\n{"prompt": "p"}\n')
    with pytest.raises(ValueError, match=r"data\.jsonl, row 2: it has no 'id', and is of something else"):
        Journal(tmp_path / "data.jsonl", ["id"])


def test_a_file_of_several_names_is_not_written(tmp_path: Path) -> None:
    rows, other = tmp_path / "rows.jsonl", tmp_path / "other.jsonl"
    rows.write_text('{"id": 1}\n')
    other.hardlink_to(rows)
    with pytest.raises(ValueError, match=r"other\.jsonl has other names \(hard links\).*: put a copy in its place"):
        Journal(other)
    rows.unlink()
    assert Journal(other).rows == [{"id": 1}]


def test_two_files_of_rows_have_nothing_beside_them_in_common() -> None:
    names = [beside(Path("a", name), "asked.jsonl").name for name in ("x.jsonl", "x.v1.jsonl", "x.v2.jsonl")]
    assert names == ["x.asked.jsonl", "x.v1.asked.jsonl", "x.v2.asked.jsonl"]
    for name in ("x", "x.v1", "x.json", "x.jsonl.gz", ".jsonl"):
        with pytest.raises(ValueError, match=rf"a/{name}: the name of a file of rows must end in \.jsonl"):
            beside(Path("a", name), "asked.jsonl")


def test_what_libraries_write_into_a_folder_that_is_gone_is_said_in_words(tmp_path: Path) -> None:
    gone = tmp_path / "gone" / "file"
    for write in (
        lambda: torch.save({}, gone),
        lambda: save_file({"a": torch.zeros(1)}, gone),
        lambda: gone.write_text("text"),
    ):
        with pytest.raises(ValueError, match="it was deleted or moved while this ran: put it back"), writing_in(gone):
            write()


@pytest.mark.parametrize(
    "error",
    [
        ValueError("No space left on device (os error 28)"),
        RuntimeError("No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:1] . PytorchStreamReader failed reading zip archive"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/tmp/absent"),
        OSError("a model that is no folder"),
        ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
    ],
)
def test_what_the_disk_has_nothing_to_do_with_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, writing_in(Path("run")):
        raise error
    assert raised.value is error


def full(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_who_holds_a_file_hears_in_words_what_the_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = tmp_path / "labels.jsonl"
    with pytest.raises(ValueError, match=rf"{labels}: the disk is full: make room"), held(labels):
        journal = Journal(labels)
        journal.append({"id": 1})
        monkeypatch.setattr(os, "fsync", full)
        journal.append({"id": 2})
    assert read_rows(labels) == [{"id": 1}]
    with pytest.raises(ValueError, match=r"labels\.jsonl\.owner\.json: the disk is full"), held(labels):
        pass
    monkeypatch.undo()
    with held(labels):
        pass


def test_a_command_that_holds_nothing_says_it_in_words_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*words: object) -> None:
        raise refusal(errno.EROFS)

    monkeypatch.setattr("rlhf_recipes.report.write.write_report", refused)
    assert "error: file: this disk can only be read" in error_of(capsys, ["report", "run"])


def test_a_file_of_rows_that_was_deleted_is_not_begun_anew(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "rows.jsonl")
    journal.append({"id": 1})
    journal.append({"id": 2})
    journal.path.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"rows\.jsonl was deleted or moved while this ran, with 2 rows: put it back"):
        journal.append({"id": 3})
    assert not journal.path.exists()
    (tmp_path / "moved").rename(journal.path)
    journal.append({"id": 3})
    assert read_rows(journal.path) == [{"id": 1}, {"id": 2}, {"id": 3}]
