"""A source from outside the package: pictures and captions in a table of an SQLite database.

    python examples/add_a_source.py --set 'sources=[{kind: sqlite, uri: museum.db, table: objects}]' --set out=data/museum

Everything of the ingest job holds for it: checks, quarantine, duplicates, shards, going on where it was killed.
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import Field

from unclip.cluster.ingest import IngestConfig, run_ingest
from unclip.cluster.jobs import exit_status
from unclip.config.cli import parse_job
from unclip.data.manifest import DataError
from unclip.data.sources import RAW_SCHEMA, Part, SourceConfig
from unclip.data.sources.base import Row, SourceSettings, to_tables
from unclip.utils import storage

Identifier = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
"""SQLite has no placeholders for names, so they have to be plain."""


# --8<-- [start:config]
class SqliteSourceConfig(SourceSettings):
    """A table with a picture and a caption in each row. `uri` is the database's file."""

    kind: Literal["sqlite"] = "sqlite"
    table: Identifier
    """The table."""
    image_column: Identifier = "image"
    """Column of encoded pictures."""
    caption_column: Identifier = "caption"
    """Column of captions."""
    rows_per_part: int = Field(default=1024, gt=0)
    """Rows that one task reads, and reads again after an interruption."""

    def build(self) -> SqliteSource:
        return SqliteSource(self)


# --8<-- [end:config]
# --8<-- [start:source]
@dataclass(frozen=True)
class RowRange(Part):
    """Rows of the table with `first` <= rowid <= `last`; `size` is the file's, so that a changed file is another part."""

    first: int
    last: int
    size: int


class SqliteSource:
    """Reads the table in the order of its rowids."""

    def __init__(self, config: SqliteSourceConfig) -> None:
        self._config = config

    def schema(self) -> pa.Schema:
        return RAW_SCHEMA

    def parts(self) -> tuple[RowRange, ...]:
        config, step = self._config, self._config.rows_per_part
        rowids = [rowid for (rowid,) in self._select(f"SELECT rowid FROM {config.table} ORDER BY rowid")]  # noqa: S608
        if not rowids:
            raise DataError(f"source {config.uri!r}: table {config.table!r} has no rows")
        size = storage.size(config.uri) or 0
        groups = [rowids[start : start + step] for start in range(0, len(rowids), step)]
        return tuple(RowRange(f"{group[0]:020d}", group[0], group[-1], size) for group in groups)

    def read(self, part: RowRange) -> Iterator[pa.Table]:
        yield from to_tables(self._rows(part), self.schema())

    def _rows(self, part: RowRange) -> Iterator[Row]:
        config = self._config
        columns = f"rowid, {config.image_column}, {config.caption_column}"
        query = f"SELECT {columns} FROM {config.table} WHERE rowid BETWEEN ? AND ? ORDER BY rowid"  # noqa: S608
        for rowid, image, caption in self._select(query, part.first, part.last):
            yield Row(str(rowid), image, caption)

    def _select(self, query: str, *values: int) -> Iterator[tuple[Any, ...]]:
        with storage.local_file(self._config.uri) as path:
            try:
                with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
                    yield from connection.execute(query, values)
            except sqlite3.Error as error:
                raise DataError(f"source {self._config.uri!r}: {error}") from None


# --8<-- [end:source]
# --8<-- [start:use]
AnySourceConfig = Annotated[SqliteSourceConfig | SourceConfig, Field(discriminator="kind")]


class IngestWithSqlite(IngestConfig):
    """The ingest job with one kind of source more."""

    sources: tuple[AnySourceConfig, ...] = ()  # type: ignore[assignment]  # wider than the house's
    """As the house's job has them, and `sqlite`."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_job(__doc__ or "", {"default": IngestWithSqlite}, argv)
    return exit_status("add_a_source", lambda: _ingest(arguments.config), goes_on="with what is missing")


def _ingest(config: IngestConfig) -> None:
    facts = run_ingest(config)
    print(f"{facts['rows']} records in {config.out}")


# --8<-- [end:use]
if __name__ == "__main__":
    sys.exit(main())
