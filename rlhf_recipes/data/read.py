"""Reading sources as numbered rows: files or URLs (JSONL, JSON, CSV, Parquet, also .gz), Hub datasets and functions."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import datasets
import fsspec
import pyarrow as pa
from datasets.exceptions import DatasetsError

from ..recipe.lookup import function, holds_secret, is_function, secret_refused
from ..recipe.values import Source
from .hub import ask_hub
from .kept import VALUE, most_bytes
from .parquet import json_rows, parquet_rows
from .sources import conversion, recognized, resolve_source

LONGEST_LINE = 2**26  # characters, also of a table's row of many lines: what is longer is no row
LONGEST_LIST = 2**30  # characters of a JSON list, which is in memory whole


def read(stage: str, source: Source) -> Iterator[tuple[int, Any]]:
    """All rows of a stage's source, with their numbers. What its `limit` takes of them is for `draw` to say.

    These count from 1: lines of a JSONL file, data rows of all others, and what a conversion has made. Raises
    ValueError, naming the stage's setting, where the source is not there or cannot be read.
    """
    if not source.data:
        raise ValueError(f"{stage}.data is empty: name a file, a dataset of the Hub, or module:function.")
    source = resolve_source(source)
    numbered, name = _with_conversion(source, _read_source(stage, source))
    if name is not None:
        convert = conversion(f"{stage}.convert", name)
        numbered = enumerate(convert(row for _, row in numbered), 1)
    return numbered


def conversion_of(stage: str, source: Source) -> str | None:
    """The conversion with which a source is read: the user's, its name's, or that of the file's columns."""
    source = resolve_source(source)
    return _with_conversion(source, _read_source(stage, source))[1]


def first_row(stage: str, source: Source) -> Any:
    """The first row of a source as it stands there, before any conversion; None where there is none."""
    return next(_read_source(stage, resolve_source(source)), (0, None))[1]


def _with_conversion(
    source: Source, numbered: Iterator[tuple[int, Any]]
) -> tuple[Iterator[tuple[int, Any]], str | None]:
    """The rows, unread, and the name of their conversion, for which the first row of a file is looked at.

    The user's own `convert` or `columns` come first.
    """
    if source.convert is not None or source.columns or not _is_file(source):
        return numbered, source.convert
    first = list(islice(numbered, 1))
    return chain(first, numbered), recognized(first[0][1]) if first else None


def _is_file(source: Source) -> bool:
    """Whether a source is a file or the URL of one, and no function and no dataset of the Hub."""
    path = Path(source.data)
    is_known = path.is_file() or file_kind(path) in READERS or path.suffix == ".gz"
    return not is_function(source.data) and (is_known or "://" in source.data)


def _read_source(stage: str, source: Source) -> Iterator[tuple[int, Any]]:
    """All rows of a function, a file or a Hub dataset, before any conversion."""
    if is_function(source.data):
        yield from enumerate(function(source.data)(), 1)
    elif _is_file(source):
        yield from _read_file(f"{stage}.data", source.data)
    else:
        yield from enumerate(_read_hub(stage, source), 1)


def file_kind(path: Path) -> str:
    """The suffix that says how a file is read, a key of `READERS` if it is known; without .gz."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _read_file(key: str, path: str) -> Iterator[tuple[int, Any]]:
    """The rows of a file, by its path or URL. Raises ValueError, naming the setting `key`, file and line."""
    is_url = "://" in path
    if holds_secret(path):
        raise ValueError(f"{key}: {secret_refused(path)}")
    if not is_url and not Path(path).is_file():
        raise ValueError(f"{key}: there is no file {path}.")
    if path.startswith("hf://datasets/"):
        ask_hub("/".join(path.split("/")[3:5]), kind="datasets")
    kind = file_kind(Path(path))
    if kind not in READERS:
        raise ValueError(f"{key}: {path} is none of {', '.join(READERS)}, each also with .gz.")
    try:
        with ExitStack() as stack:
            file: Any = stack.enter_context(_open_url(path)) if is_url else stack.enter_context(open(path, "rb"))
            yield from READERS[kind](stack.enter_context(gzip.open(file)) if path.endswith(".gz") else file)
    except json.JSONDecodeError as error:
        raise ValueError(f"{key}: {path}, line {error.lineno}: not JSON ({error.msg}).") from error
    except RecursionError as error:
        raise ValueError(f"{key}: cannot read {path}: it is nested too deep.") from error
    except MemoryError as error:
        raise ValueError(f"{key}: cannot read {path}: a row, or a list of them, does not fit into memory.") from error
    except (OSError, EOFError, ValueError, zlib.error, csv.Error, pa.ArrowException) as error:
        raise ValueError(f"{key}: cannot read {path}: {error}") from error
    except (OverflowError, LookupError) as error:  # of tables
        raise ValueError(
            f"{key}: cannot read {path}: it holds a day or a time zone that there is not ({error})."
        ) from error


def _open_url(url: str) -> Any:
    """The file of a URL, which is opened by a `with`. Raises ValueError where fsspec cannot open such ones."""
    try:
        return fsspec.open(url, "rb")
    except (ImportError, TypeError) as error:  # it needs another package; it is told more than a URL can say
        raise ValueError(error) from error


def _read_jsonl(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """JSON lines."""
    return _json_lines(_lines(io.TextIOWrapper(file, encoding="utf-8-sig")))


def _lines(text: TextIO) -> Iterator[str]:
    """The lines of a text. Raises ValueError for one that is too long: a packed file may hold one of gigabytes."""
    while line := text.readline(LONGEST_LINE + 1):
        if len(line) > LONGEST_LINE:
            raise ValueError(f"a line is longer than {LONGEST_LINE:,} characters.")
        yield line


def _read_json(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """One JSON list, or JSON lines, which are common under this suffix as well."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig")
    while (first := text.read(1)).isspace():
        pass
    text.seek(0)
    if first != "[":
        return _json_lines(_lines(text))
    whole = text.read(LONGEST_LIST + 1)
    if len(whole) > LONGEST_LIST:
        raise ValueError(f"a list of more than {LONGEST_LIST:,} characters: write it as JSON lines (.jsonl).")
    # Before each value stands one of these signs, so that it is known what all of them may take.
    if len(whole) + VALUE * sum(map(whole.count, ",:[{")) > most_bytes():
        raise ValueError("a list that would fill half of the memory: write it as JSON lines (.jsonl).")
    return iter(enumerate(json.loads(whole), 1))


def _json_lines(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """A row of each line that is not blank. Raises JSONDecodeError with the number of the line in the file."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                error.lineno = number
                raise
            except RecursionError as error:
                raise ValueError(f"line {number} is nested too deep.") from error
            except ValueError as error:  # a number of thousands of digits
                raise ValueError(f"line {number}: {error}") from error
            yield number, row


def _read_csv(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """A table with a header. All cells are text, but for messages."""
    # Read by the standard library, not pyarrow, which fails a whole column for one cell of another type.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    taken = 0

    def lines() -> Iterator[str]:  # a cell in quotes goes on over them
        nonlocal taken
        for line in _lines(text):
            taken += len(line)
            if taken > LONGEST_LINE:
                raise ValueError(f"a row is longer than {LONGEST_LINE:,} characters.")
            yield line

    for number, row in enumerate(csv.DictReader(lines()), 1):
        taken = 0
        yield number, {column: _decode(cell) for column, cell in row.items()}


def _read_parquet(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """A table with types."""
    for number, row in enumerate(parquet_rows(file), 1):
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
        except (ValueError, RecursionError):
            return cell
    return cell


def _read_hub(stage: str, source: Source) -> Iterable[Any]:
    """A dataset of the Hub, or a local folder that `datasets` can read. Raises ValueError where it is neither."""
    try:
        dataset = datasets.load_dataset(ask_hub(source.data, kind="datasets"), name=source.subset, split=source.split)
    except (OSError, ValueError, RuntimeError, IndexError, DatasetsError) as error:  # an index: of the folder /
        raise ValueError(
            f"{stage}.data: {source.data!r} is no local file or function, and cannot be loaded as a dataset of the Hub "
            f"(subset {source.subset!r}, split {source.split!r}): {error}"
        ) from error
    assert isinstance(dataset, datasets.Dataset)
    return json_rows(dataset, dataset.features.arrow_schema)
