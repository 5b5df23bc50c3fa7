"""Lists of records: text files with a record on each line or row, and Parquet."""

from __future__ import annotations

import csv
import json
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from unclip.data.manifest import DataError
from unclip.data.sources.base import StorageFile

LIST_SUFFIXES = (".jsonl", ".csv", ".tsv", ".txt", ".parquet")
_MAX_LINE = 1 << 24
_BLOCK = 1 << 18
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


class Stretch(NamedTuple):
    """Records from `start` up to `stop` of a list; the first begins at byte `offset` (0 in Parquet)."""

    start: int
    stop: int
    offset: int


def read_records(
    uri: str, start: int = 0, stop: int | None = None, offset: int = 0, *, line_field: str = "url"
) -> Iterator[Record]:
    """The records from `start` up to `stop` of a list, by what its name ends in.

    `.jsonl`: a JSON object a line. `.csv`, `.tsv`: the first row names the fields. `.txt`: a line is one field.
    `.parquet`: the columns are the fields. Empty lines do not count. Raises `DataError` where Parquet cannot be read.

    Args:
        offset: byte at which record `start` begins, by `divide`; nothing before it is read but the first row of a
            table. 0 for Parquet, and for what is read from the start.
        line_field: name of the field that a line of `.txt` is.
    """
    if _is_parquet(uri):
        values: Iterator[dict[str, Any] | str] = _parquet(uri, start, stop)
    else:
        skipped = 0 if offset else start
        values = (
            value
            for _, value in islice(
                _text(uri, offset, line_field), skipped, None if stop is None else skipped + stop - start
            )
        )
    for number, value in enumerate(values, start):
        yield Record(number, {}, value) if isinstance(value, str) else Record(number, value)


def divide(uri: str, most: int) -> list[Stretch]:
    """All records of a list in stretches of at most `most`, of Parquet whole row groups or rows of one.

    Reads a text list whole, of Parquet the footer. Raises as `read_records` does.
    """
    if not _is_parquet(uri):
        offsets, rows = [], 0
        for offset, _ in _text(uri, 0, ""):
            if rows % most == 0:
                offsets.append(offset)
            rows += 1
        return [Stretch(i * most, min(rows, (i + 1) * most), offset) for i, offset in enumerate(offsets)]
    with StorageFile(uri) as file:
        try:
            footer = pq.read_metadata(file)
        except _BROKEN as error:
            if file.failed:
                raise
            raise DataError(f"{uri!r} is not readable Parquet: {error}") from error
    return list(_cut([footer.row_group(group).num_rows for group in range(footer.num_row_groups)], most))


def _cut(groups: Iterable[int], most: int) -> Iterator[Stretch]:
    start = stop = 0
    for rows in groups:
        if stop > start and stop - start + rows > most:
            yield Stretch(start, stop, 0)
            start = stop
        stop += rows
        while stop - start > most:
            yield Stretch(start, start + most, 0)
            start += most
    if stop > start:
        yield Stretch(start, stop, 0)


def _is_parquet(uri: str) -> bool:
    return uri.lower().endswith(".parquet")


def _text(uri: str, offset: int, line_field: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """The records that begin at byte `offset` or later, and the byte at which each does."""
    suffix = uri.lower().rpartition(".")[2]
    with StorageFile(uri) as file:
        if suffix in ("csv", "tsv"):
            yield from _table(file, offset, "\t" if suffix == "tsv" else ",")
            return
        file.seek(offset)
        for start, line in _lines(file, offset):
            if line.strip():
                yield start, {line_field: line.strip()} if suffix == "txt" else _json_object(line)


def _lines(file: StorageFile, offset: int) -> Iterator[tuple[int, str]]:
    """Lines from byte `offset` on, where the file stands, each with the byte at which it begins.

    One of more than _MAX_LINE bytes comes in pieces, none of which is a record.
    """
    for line in _byte_lines(file):
        text = line.removeprefix(BOM_UTF8) if offset == 0 else line
        yield offset, text.decode("utf-8", "surrogateescape")
        offset += len(line)


def _byte_lines(file: StorageFile) -> Iterator[bytes]:
    rest = b""
    while block := file.read(_BLOCK):
        *lines, rest = (rest + block).splitlines(keepends=True)  # the last may go on, if only by the \n after an \r
        yield from lines
        if len(rest) > _MAX_LINE:
            yield rest
            rest = b""
    if rest:
        yield rest


def _json_object(line: str) -> dict[str, Any] | str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"no JSON: {error}"
    return value if isinstance(value, dict) else f"no JSON object, but {type(value).__name__}"


def _table(file: StorageFile, offset: int, delimiter: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    rows = _csv_rows(file, 0, delimiter)
    start, header = next(rows, (0, []))
    if isinstance(header, str):  # then all rows are bad
        if offset == 0:
            yield start, header
        header = []
    if offset:
        file.seek(offset)
        rows = _csv_rows(file, offset, delimiter)
    for start, row in rows:
        if isinstance(row, str):
            yield start, row
        elif len(row) == len(header):
            yield start, dict(zip(header, row, strict=True))
        else:
            yield start, f"{len(row)} fields, not {len(header)} as in the first row"


def _csv_rows(file: StorageFile, offset: int, delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """Rows but empty ones, or why there is none, with the byte at which each begins."""
    start = None

    def lines() -> Iterator[str]:
        nonlocal start
        for at, line in _lines(file, offset):
            start = at if start is None else start  # quoted fields go on over lines
            yield line

    rows = csv.reader(lines(), delimiter=delimiter)
    while True:
        start = None
        row: list[str] | str | None
        try:
            row = next(rows, None)
        except csv.Error as error:
            row = f"no row: {error}"
        if row is None:
            return
        if row:
            yield start or 0, row


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
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return column.to_pylist()
    texts = column.cast(pa.large_binary()).to_pylist()
    return [None if text is None else text.decode("utf-8", "surrogateescape") for text in texts]
