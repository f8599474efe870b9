"""Parquet files that hold more than the memory does, packed."""

import datetime
import decimal
import gzip
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_recipes.data.check import _chunks, survey_source
from rlhf_recipes.data.read import read
from rlhf_recipes.recipe.values import Source

LIMITS = "rlhf_recipes.data.parquet"


def rows_of(path: Path) -> Iterator[Any]:
    return (row for _, row in read("ppo", Source(str(path))))


def repeated(text: str, times: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([0] * times, pa.int32()), pa.array([text]))


def written(path: Path, column: pa.Array) -> Path:
    pq.write_table(pa.table({"prompt": column}), path, compression="zstd", dictionary_pagesize_limit=2**30)
    assert path.stat().st_size < 100_000
    return path


def test_a_long_text_that_each_row_repeats_is_read_row_by_row(tmp_path: Path) -> None:
    bomb = written(tmp_path / "rows.parquet", repeated("a" * 2**23, 10_000))  # 80 GB
    assert [len(row["prompt"]) for row in islice(rows_of(bomb), 3)] == [2**23] * 3
    assert pa.default_memory_pool().max_memory() < 2**30


def test_a_row_that_repeats_a_long_text_is_refused(tmp_path: Path) -> None:
    texts = repeated("a" * 2**20, 100_000)
    rows = pa.ListArray.from_arrays(pa.array([0, 2, 100_000]), texts)
    with pytest.raises(ValueError, match=r"ppo\.data: cannot read .*rows\.parquet: a row is longer than 67,108,864 b"):
        list(rows_of(written(tmp_path / "rows.parquet", rows)))


def test_numbers_that_would_fill_the_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{LIMITS}.LARGEST_GROUP", 100_000)
    numbers = pa.array([[0] * 20_000])
    with pytest.raises(
        ValueError, match=r"group's column 'prompt\.list\.element' has 20,000 values: write smaller row gr"
    ):
        list(rows_of(written(tmp_path / "rows.parquet", numbers)))
    fixed = pa.array([b"a" * 200] * 1_000, pa.binary(200))
    with pytest.raises(ValueError, match=r"group's column 'prompt' has 1,000 values"):
        list(rows_of(written(tmp_path / "rows.parquet", fixed)))


def test_what_unpacks_without_end_does_not_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{LIMITS}.LARGEST_GROUP", 2**22)
    (tmp_path / "rows.parquet.gz").write_bytes(gzip.compress(b"\0" * 2**24))
    with pytest.raises(ValueError, match=r"rows\.parquet\.gz: it unpacks to more than 4,194,304 bytes"):
        list(rows_of(tmp_path / "rows.parquet.gz"))


@pytest.mark.parametrize(
    "values",
    [
        pa.StructArray.from_arrays([pa.array(np.zeros(5 * 10**6, bool))], ["a"]),
        pa.DictionaryArray.from_arrays(pa.array(np.zeros(5 * 10**6, np.int32)), pa.array([""])),
    ],
)
def test_a_row_of_millions_of_small_values_is_refused(tmp_path: Path, values: pa.Array) -> None:
    rows = pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)
    with pytest.raises(ValueError, match=r"cannot read .*rows\.parquet: a row is longer than 67,108,864 bytes"):
        list(rows_of(written(tmp_path / "rows.parquet", rows)))


def test_a_check_holds_few_rows_where_they_are_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_recipes.data.check.CHUNK_BYTES", 100_000)
    data = written(tmp_path / "rows.parquet", repeated("a" * 60_000, 20))
    assert [len(rows) for rows in _chunks(read("ppo", Source(str(data))), "x")] == [2] * 10
    assert survey_source(Source(str(data))).total == 20


@pytest.mark.parametrize("limits", [{}, {"LARGEST_PIECE": 0}, {"LARGEST_GROUP": 1000, "PIECE": 1}])
def test_limits_change_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]) -> None:
    for name, limit in limits.items():
        monkeypatch.setattr(f"{LIMITS}.{name}", limit)
    columns = {
        "text": pa.array(["a", None, "b", "a"]),
        "long": pa.array(["a", "b", "a", "b"], pa.large_string()),
        "view": pa.array(["a", None, "b", "a"], pa.string_view()),
        "kept": pa.array(["x", "y", "x", None]).dictionary_encode(),
        "messages": pa.array([[{"role": "user", "content": "a"}] * 2, [], None, [{"role": None, "content": ""}]]),
        "lists": pa.array([[["a"], ["b", None]], None, [[]], [["a"]]]),
        "pairs": pa.array([["a", "b"], None, ["c", "d"], ["a", "a"]], pa.list_(pa.string(), 2)),
        "map": pa.array([[("k", "v")], [("k", "w"), ("l", "v")], None, []], pa.map_(pa.string(), pa.string())),
        "deep": pa.array([{"a": {"b": "c"}, "d": ["e"]}, None, {"a": None, "d": None}, {"a": None, "d": []}]),
        "none": pa.nulls(4),
        "day": pa.array([datetime.date(2026, 3, 31)] * 4),
        "cost": pa.array([decimal.Decimal("1.5"), None, None, None]),
        "raw": pa.array([b"\xff", None, b"", b"a"]),
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    rows = pa.table(columns).to_pylist()
    for row in rows:
        row["map"] = row["map"] and [list(pair) for pair in row["map"]]
        row |= {key: row[key] if row[key] is None else str(row[key]) for key in ("day", "cost", "raw")}
    assert list(rows_of(tmp_path / "rows.parquet")) == rows
