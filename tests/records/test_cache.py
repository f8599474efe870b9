"""What is kept beside all run folders."""

import hashlib
from pathlib import Path

import pytest

from rlhf_recipes.records import cache


def test_a_hash_is_of_whole_files_and_remembered_until_one_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_RECIPES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "REMEMBERED", 10)
    file = tmp_path / "weights"
    file.write_bytes(b"a" * 2**20 + b"b")
    assert cache.hash_of_files([file]) == hashlib.sha256(b"weights 1048577" + file.read_bytes()).hexdigest()
    (kept,) = (tmp_path / "cache" / "hashes").iterdir()
    kept.write_text("remembered")
    assert cache.hash_of_files([file]) == "remembered"
    file.write_bytes(b"a" * 2**20 + b"c")  # behind the first MiB, and as long as it was
    assert cache.hash_of_files([file]) == hashlib.sha256(b"weights 1048577" + file.read_bytes()).hexdigest()
