"""Lists of addresses and captions, whose pictures are fetched."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Literal

import pyarrow as pa
from pydantic import Field

from unclip.data.manifest import DataError
from unclip.data.sources.base import FieldSettings, Part, Row, is_utf8, printable, to_json, to_tables
from unclip.data.sources.fetch import Downloader, FetchFailed, FetchPolicy
from unclip.data.sources.listing import SourceFile, find_shards
from unclip.data.sources.lists import LIST_SUFFIXES, Record, divide, read_records


class UrlSourceConfig(FieldSettings):
    """Lists: `.parquet`, `.jsonl`, `.csv`, `.tsv` with a header, or `.txt` with an address a line.

    Lists are read once at the start, to count their rows; a part then reads its own rows, of Parquet the row group.
    """

    kind: Literal["urls"] = "urls"
    url_column: str = "url"
    """Field with the address, http or https."""
    caption_column: str | None = "caption"
    """Field with the caption; null = there is none."""
    rows_per_part: int = Field(1024, gt=0, le=1 << 20)
    """Rows that are fetched, and fetched again after an interruption, at once."""
    fetch: FetchPolicy = FetchPolicy()
    """How much is asked of the network."""

    def build(self) -> UrlSource:
        return UrlSource(self)


@dataclass(frozen=True)
class ListRows(Part):
    """Some rows of a list.

    Args:
        offset: byte at which the first begins; of Parquet 0.
        problem: why the list cannot be read; it is one part then, with one row.
    """

    file: SourceFile
    start: int
    stop: int
    offset: int = 0
    problem: str | None = None


class UrlSource:
    """A part is some rows of a list, of Parquet whole row groups or rows of one.

    Rows come in the order of the list, whichever is fetched first.
    """

    def __init__(self, config: UrlSourceConfig) -> None:
        self._config = config

    def schema(self) -> pa.Schema:
        return self._config.table_schema()

    def parts(self) -> tuple[ListRows, ...]:
        files = find_shards(self._config.uri, LIST_SUFFIXES)
        parts = tuple(part for file in files for part in self._parts_of(file))
        readable = [part for part in parts if part.problem is None]
        if not readable:
            raise DataError(f"source {self._config.uri!r} holds no rows" + (f": {parts[0].problem}" if parts else ""))
        self._check_columns(readable)
        return parts

    def read(self, part: ListRows) -> Iterator[pa.Table]:
        yield from to_tables(self._rows(part), self.schema())

    def _parts_of(self, file: SourceFile) -> Iterator[ListRows]:
        try:
            stretches = divide(file.uri, self._config.rows_per_part)
        except DataError as error:
            yield ListRows(f"{file.name}#0", file, 0, 1, problem=f"{error}; how many rows it has is unknown")
            return
        for start, stop, offset in stretches:
            yield ListRows(f"{file.name}#{start}", file, start, stop, offset)

    def _check_columns(self, parts: Iterable[ListRows]) -> None:
        """Raises `DataError` where the first record that can be read lacks the fields that were asked for."""
        for part in parts:
            try:
                record = next(read_records(part.file.uri, part.start, part.start + 1, part.offset))
            except DataError:
                continue
            for name in (self._config.url_column, self._config.caption_column):
                if record.problem is None and name is not None and name not in record.values:
                    raise DataError(f"{part.file.uri!r} has no field {name!r}; it has {', '.join(record.values)}")
            return

    def _rows(self, part: ListRows) -> Iterator[Row]:
        if part.problem is not None:
            yield Row(part.name, reason="unreadable_shard", detail=part.problem)
            return
        waiting: deque[tuple[Row, Future[bytes] | None]] = deque()
        with Downloader(self._config.fetch) as downloader:
            for row, url in self._requests(part):
                waiting.append((row, None if url is None else downloader.submit(url)))
                if len(waiting) > 2 * self._config.fetch.concurrency:
                    yield _finished(*waiting.popleft())
            while waiting:
                yield _finished(*waiting.popleft())

    def _requests(self, part: ListRows) -> Iterator[tuple[Row, str | None]]:
        """The rows without pictures, and the addresses of those that may go on."""
        records = read_records(part.file.uri, part.start, part.stop, part.offset)
        for number in range(part.start, part.stop):
            try:
                record = next(records, None)
            except DataError as error:
                detail = f"breaks before row {number}: {error}"
                for lost in range(number, part.stop):
                    yield Row(f"{part.file.name}:{lost}", reason="unreadable_shard", detail=detail), None
                return
            if record is None:
                raise DataError(f"{part.file.uri!r} ends before row {number}: it has changed since it was listed")
            row = self._row(f"{part.file.name}:{number}", record)
            url = record.values.get(self._config.url_column)
            if row.reason is None and (not isinstance(url, str) or not url.strip()):
                row = replace(row, reason="no_url", detail=f"field {self._config.url_column!r} holds no address")
            yield row, str(url).strip() if row.reason is None else None

    def _row(self, key: str, record: Record) -> Row:
        if record.problem is not None:
            return Row(key, reason="bad_row", detail=record.problem)
        values = dict(record.values)
        caption = values.pop(self._config.caption_column, None) if self._config.caption_column is not None else None
        row = Row(key, carried=self._config.carried(values, to_json(values)))
        if caption is not None and not isinstance(caption, str):
            return replace(row, reason="bad_row", detail=f"field {self._config.caption_column!r} is no text")
        if caption is not None and not is_utf8(caption):
            detail = f"field {self._config.caption_column!r} is not UTF-8"
            return replace(row, caption=printable(caption), reason="invalid_utf8", detail=detail)
        return replace(row, caption=caption)


def _finished(row: Row, download: Future[bytes] | None) -> Row:
    if download is None:
        return row
    try:
        return replace(row, image=download.result())
    except FetchFailed as error:
        return replace(row, reason="fetch_failed", detail=str(error))
