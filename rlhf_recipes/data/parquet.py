"""Rows of a Parquet file, in bounded memory: a file of kilobytes may hold terabytes, packed.

What its footer says of the sizes of its columns is believed.
"""

import gzip
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .kept import VALUE

PIECE = 1000  # rows that are read at once: a row group may hold a million
LARGEST_PIECE = 2**28  # bytes of them that become Python's objects at once
LARGEST_ROW = 2**26  # bytes, as of a line of JSON
LARGEST_GROUP = 2**31  # bytes of a row group of which more than one row is read at once, or of a column's numbers


def parquet_rows(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """The rows of a file that can be sought, or of one of gzip, as Python's values.

    A dictionary of one long text, which a million cells repeat, is what packs best: it is read as such.

    Raises:
        ValueError: a row, or the lists of a column, would fill the memory.
        pyarrow.ArrowException: it is no Parquet file.
    """
    with tempfile.TemporaryFile() as whole:
        if isinstance(file, gzip.GzipFile):  # in which nothing can be sought
            _unpack(file, whole)
            file = whole
        metadata = pq.read_metadata(file)
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        _check_numbers(metadata.schema, groups)
        paths = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
        table = pq.ParquetFile(file, metadata=metadata, buffer_size=2**20, pre_buffer=False, read_dictionary=paths)
        is_huge = any(group.total_byte_size > LARGEST_GROUP for group in groups)
        for batch in table.iter_batches(batch_size=1 if is_huge else PIECE):
            yield from json_rows(_rows(batch), batch.schema)


def json_rows(rows: Iterable[Any], schema: pa.Schema) -> Iterable[Any]:
    """Rows of JSON values alone, which all that reads them can write: a date, a decimal or bytes become text."""
    if not re.search("date|time|duration|decimal|binary", " ".join(str(field.type) for field in schema)):
        return rows
    return (json.loads(json.dumps(row, default=str)) for row in rows)


def _unpack(file: BinaryIO, into: BinaryIO) -> None:
    """Unpack a file. Raises ValueError where it would fill the disk: nobody packs twice what packs itself."""
    while piece := file.read(2**20):
        if into.tell() > LARGEST_GROUP:
            raise ValueError(f"it unpacks to more than {LARGEST_GROUP:,} bytes: gunzip it first.")
        into.write(piece)


def _check_numbers(schema: pq.ParquetSchema, groups: list[pq.RowGroupMetaData]) -> None:
    """Raises ValueError where a column's values of fixed length, which no dictionary keeps small, fill the memory."""
    for index in range(len(schema)):
        column = schema.column(index)
        for group in groups:
            in_lists = column.max_repetition_level > 0  # else a row has one
            values = group.column(index).num_values if in_lists else min(PIECE, group.num_rows)
            if values * max(column.length, 8) > LARGEST_GROUP:
                raise ValueError(
                    f"a row group's column {column.path!r} has {values:,} values: write smaller row groups."
                )


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """The rows of a piece, one by one where together they are too large."""
    if sum(map(_unpacked_bytes, batch.columns)) <= LARGEST_PIECE:
        yield from batch.to_pylist()
        return
    for index in range(batch.num_rows):
        row = batch.slice(index, 1)
        if sum(map(_unpacked_bytes, row.columns)) > LARGEST_ROW:
            raise ValueError(f"a row is longer than {LARGEST_ROW:,} bytes.")
        yield from row.to_pylist()


def _unpacked_bytes(array: Any) -> int:
    """Bytes of Python's objects of an array's values, and of its texts, of which a dictionary holds each once."""
    return len(array) * VALUE + _inner_bytes(array)


def _inner_bytes(array: Any) -> int:
    """Bytes of the texts, or of the parts, of an array's values."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        return pc.sum(pc.take(pc.binary_length(array.dictionary), array.indices)).as_py() or 0
    if pa.types.is_struct(kind):
        return sum(map(_unpacked_bytes, array.flatten()))
    if pa.types.is_map(kind):  # which cannot be flattened
        start, end = array.offsets[0].as_py(), array.offsets[-1].as_py()
        return sum(_unpacked_bytes(part.slice(start, end - start)) for part in (array.keys, array.items))
    if pa.types.is_nested(kind):  # a list
        return _unpacked_bytes(array.flatten())
    return array.nbytes
