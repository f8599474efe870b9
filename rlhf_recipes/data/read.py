"""Reading sources: files (JSONL, JSON, CSV, Parquet, also .gz), Hub datasets and functions, as numbered rows."""

import csv
import gzip
import io
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError

from ..recipe.lookup import function, is_function
from ..recipe.values import Source
from .sources import conversion, resolve_source


def read(stage: str, source: Source) -> Iterator[tuple[int, Any]]:
    """All rows of a stage's source, with their numbers. What its `limit` takes of them is for `draw` to say.

    These count from 1: lines of a JSONL file, data rows of all others, and what a conversion has made. Raises
    ValueError, naming the stage's setting, where the source is not there or cannot be read.
    """
    source = resolve_source(source)
    numbered = _read_source(stage, source)
    if source.convert is not None:
        convert = conversion(f"{stage}.convert", source.convert)
        numbered = enumerate(convert(row for _, row in numbered), 1)
    return numbered


def _read_source(stage: str, source: Source) -> Iterator[tuple[int, Any]]:
    """All rows of a function, a file or a Hub dataset, before any conversion."""
    path = Path(source.data)
    if is_function(source.data):
        yield from enumerate(function(source.data)(), 1)
    elif path.is_file() or file_kind(path) in READERS or path.suffix == ".gz":
        yield from _read_file(f"{stage}.data", path)
    else:
        yield from enumerate(_read_hub(stage, source), 1)


def file_kind(path: Path) -> str:
    """The suffix that says how a file is read, a key of `READERS` if it is known; without .gz."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _read_file(key: str, path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a file, whatever it is. Raises ValueError, naming the setting `key`, file and line."""
    if not path.is_file():
        raise ValueError(f"{key}: there is no file {path}.")
    if file_kind(path) not in READERS:
        raise ValueError(f"{key}: {path} is none of {', '.join(READERS)}, each also with .gz.")
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield from READERS[file_kind(path)](file)
    except json.JSONDecodeError as error:
        raise ValueError(f"{key}: {path}, line {error.lineno}: not JSON ({error.msg}).") from error
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error, pa.ArrowInvalid) as error:
        raise ValueError(f"{key}: cannot read {path}: {error}") from error


def _read_jsonl(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """JSON lines."""
    return _json_lines(io.TextIOWrapper(file, encoding="utf-8-sig"))


def _read_json(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """One JSON list, or JSON lines, which are common under this suffix as well."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig")
    while (first := text.read(1)).isspace():
        pass
    text.seek(0)
    return iter(enumerate(json.load(text), 1)) if first == "[" else _json_lines(text)


def _json_lines(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """A row of each line that is not blank. Raises JSONDecodeError with the number of the line in the file."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                error.lineno = number
                raise
            yield number, row


def _read_csv(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """A table with a header. All cells are text, but for messages."""
    # Read by the standard library, not pyarrow, which fails a whole column for one cell of another type.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    for number, row in enumerate(csv.DictReader(text), 1):
        yield number, {column: _decode(cell) for column, cell in row.items()}


def _read_parquet(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """A table with types."""
    with tempfile.TemporaryFile() as whole:
        if isinstance(file, gzip.GzipFile):  # in which nothing can be sought
            shutil.copyfileobj(file, whole)
            file = whole
        # In small pieces: a row group may hold a million rows.
        table = pq.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
        rows = (row for batch in table.iter_batches(batch_size=1000) for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield number, {column: _decode(cell) for column, cell in row.items()}


READERS: dict[str, Callable[[Any], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _decode(cell: Any) -> Any:
    """A cell that holds messages as JSON text, as a table must write them, becomes messages."""
    if isinstance(cell, str) and re.match(r'\s*\[\s*\{\s*"', cell):
        try:
            return json.loads(cell)
        except json.JSONDecodeError:
            return cell
    return cell


def _read_hub(stage: str, source: Source) -> Iterable[Any]:
    """A dataset of the Hub, or a local folder that `datasets` can read. Raises ValueError where it is neither."""
    try:
        dataset = datasets.load_dataset(source.data, name=source.subset, split=source.split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise ValueError(
            f"{stage}.data: {source.data!r} is no local file or function, and cannot be loaded as a dataset of the Hub "
            f"(subset {source.subset!r}, split {source.split!r}): {error}"
        ) from error
    assert isinstance(dataset, datasets.Dataset)
    return dataset
