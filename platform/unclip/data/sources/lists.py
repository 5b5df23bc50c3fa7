"""Lists of records: text files with a record on each line or row, and Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from unclip.data.manifest import DataError
from unclip.data.sources.base import StorageFile
from unclip.utils import storage

LIST_SUFFIXES = (".jsonl", ".csv", ".tsv", ".txt", ".parquet")
_MAX_LINE = 1 << 24
_BATCH_ROWS = 1024
_BROKEN = (OSError, ValueError, pa.ArrowException)  # what pyarrow raises over a file that is no good


@dataclass(frozen=True)
class Record:
    """One record of a list.

    Args:
        number: its place among the records, from 0.
        values: its fields; texts that are not UTF-8 hold lone surrogates.
        problem: why there are none, where the line is no record.
    """

    number: int
    values: dict[str, Any]
    problem: str | None = None


def read_records(uri: str, start: int = 0, stop: int | None = None) -> Iterator[Record]:
    """The records from `start` up to `stop` of a list, by what its name ends in.

    `.jsonl`: a JSON object a line. `.csv`, `.tsv`: the first row names the fields. `.txt`: a line is the field `url`.
    `.parquet`: the columns are the fields. Empty lines do not count. Raises `DataError` where Parquet cannot be read.
    """
    values = _parquet(uri, start, stop) if _is_parquet(uri) else islice(_text(uri), start, stop)
    for number, value in enumerate(values, start):
        yield Record(number, {}, value) if isinstance(value, str) else Record(number, value)


def count_records(uri: str) -> int:
    """How many records a list has; of Parquet the footer says it. Raises as `read_records` does."""
    if not _is_parquet(uri):
        return sum(1 for _ in _text(uri))
    with StorageFile(uri) as file:
        try:
            return int(pq.read_metadata(file).num_rows)
        except _BROKEN as error:
            if file.failed:
                raise
            raise DataError(f"{uri!r} is not readable Parquet: {error}") from error


def _is_parquet(uri: str) -> bool:
    return uri.lower().endswith(".parquet")


def _text(uri: str) -> Iterator[dict[str, Any] | str]:
    fs, path = storage.filesystem(uri)
    with fs.open(path, "rb") as raw:
        lines = _lines(TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline=""))
        suffix = uri.lower().rpartition(".")[2]
        if suffix == "txt":
            yield from ({"url": line.strip()} for line in lines if line.strip())
        elif suffix == "jsonl":
            yield from (_json_object(line) for line in lines if line.strip())
        else:
            yield from _table(lines, "\t" if suffix == "tsv" else ",")


def _lines(file: TextIOWrapper) -> Iterator[str]:
    """Lines of at most _MAX_LINE characters; a longer one comes in pieces, none of which is a record."""
    while line := file.readline(_MAX_LINE):
        yield line


def _json_object(line: str) -> dict[str, Any] | str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"no JSON: {error}"
    return value if isinstance(value, dict) else f"no JSON object, but {type(value).__name__}"


def _table(lines: Iterable[str], delimiter: str) -> Iterator[dict[str, Any] | str]:
    rows = csv.reader(lines, delimiter=delimiter)
    header: list[str] | None = None
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield f"no row: {error}"
            continue
        if row is None:
            return
        if header is None:
            header = row
        elif len(row) == len(header):
            yield dict(zip(header, row, strict=True))
        elif row:
            yield f"{len(row)} fields, not {len(header)} as in the first row"


def _parquet(uri: str, start: int, stop: int | None) -> Iterator[dict[str, Any]]:
    with StorageFile(uri) as file:
        try:
            parquet = pq.ParquetFile(file, pre_buffer=False)
            last = parquet.metadata.num_rows if stop is None else stop
            first = 0
            for group in range(parquet.num_row_groups):
                rows = parquet.metadata.row_group(group).num_rows
                if first < last and start < first + rows:
                    yield from _row_group(parquet, group, max(0, start - first), last - first)
                first += rows
        except _BROKEN as error:
            if file.failed:
                raise
            raise DataError(f"{uri!r} is not readable Parquet: {error}") from error


def _row_group(parquet: pq.ParquetFile, group: int, start: int, stop: int) -> Iterator[dict[str, Any]]:
    first = 0
    for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=[group], use_threads=False):
        if first >= stop:
            return
        wanted = batch.slice(min(max(0, start - first), batch.num_rows), max(0, stop - max(start, first)))
        columns = [_values(column) for column in wanted.columns]
        for row in range(wanted.num_rows):
            yield {name: column[row] for name, column in zip(batch.schema.names, columns, strict=True)}
        first += batch.num_rows


def _values(column: pa.Array) -> list[Any]:
    """Python values; Arrow takes over text that is not UTF-8 unseen, and cannot make a `str` of it."""
    if not pa.types.is_string(column.type):
        return column.to_pylist()
    texts = column.cast(pa.binary()).to_pylist()
    return [None if text is None else text.decode("utf-8", "surrogateescape") for text in texts]
