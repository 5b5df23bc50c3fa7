"""Parquet files with pictures in them, as Hugging Face datasets and this platform write them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unclip.data.manifest import DataError
from unclip.data.sources.base import (
    RAW_SCHEMA,
    READ_BYTES,
    READ_ROWS,
    Part,
    Row,
    SourceSettings,
    StorageFile,
    read_text,
    to_tables,
)
from unclip.data.sources.listing import SourceFile, find_shards

_FOOTER_THREADS = 32
_READ_BUFFER = 1 << 20
_BROKEN = (OSError, ValueError, pa.ArrowException)  # what pyarrow raises over a file that is no good


class ParquetSourceConfig(SourceSettings):
    """Parquet with a column of encoded pictures. The first file that can be read says which columns there are."""

    kind: Literal["parquet"] = "parquet"
    image_column: str = "image"
    """Encoded pictures: binary, or a struct with a binary field `bytes`."""
    caption_column: str | None = "caption"
    """Captions, UTF-8; null = there are none."""
    key_column: str | None = None
    """A row's name within the source; null = FILE:ROW."""
    columns: tuple[str, ...] | None = None
    """Further columns to carry along; null = all."""

    def build(self) -> ParquetSource:
        return ParquetSource(self)


@dataclass(frozen=True)
class RowGroup(Part):
    """One row group.

    Args:
        first_row: its first row's number in the file.
        rows: how many it has, by the footer.
        carried: the columns that the source carries along, with the types of its first file.
        size: bytes of the file, which tell when it has changed in place.
        problem: why the file cannot be read; it is one part then, with one row.
    """

    uri: str
    row_group: int
    first_row: int
    rows: int
    carried: pa.Schema
    size: int
    problem: str | None = None

    def key(self, row: int) -> str:
        """FILE:ROW of one of its rows, counted from its first."""
        return f"{self.name.rpartition('#')[0]}:{self.first_row + row}"


@dataclass(frozen=True)
class _File:
    """A file with its footer."""

    file: SourceFile
    footer: pq.FileMetaData
    schema: pa.Schema


@dataclass(frozen=True)
class _BrokenFile:
    """A file without one, and why."""

    file: SourceFile
    problem: str


class ParquetSource:
    """A part is a row group; a file that cannot be opened is a part with one row, `unreadable_shard`."""

    def __init__(self, config: ParquetSourceConfig) -> None:
        self._config = config

    def schema(self) -> pa.Schema:
        return self._schema(self._first(map(_open_footer, self._files())))

    def parts(self) -> tuple[RowGroup, ...]:
        files = self._files()
        carried = pa.schema(list(self.schema())[len(RAW_SCHEMA) :])
        with ThreadPoolExecutor(min(_FOOTER_THREADS, len(files))) as threads:
            parts = tuple(chain.from_iterable(threads.map(partial(_parts_of, carried=carried), files)))
        if not parts:
            raise DataError(f"source {self._config.uri!r}: its {len(files)} Parquet files hold no rows")
        return parts

    def read(self, part: RowGroup) -> Iterator[pa.Table]:
        schema = pa.schema([*RAW_SCHEMA, *part.carried])
        if part.problem is not None:
            yield from to_tables([Row(part.name, reason="unreadable_shard", detail=part.problem)], schema)
            return
        rows, problem = 0, "there are no more"
        with StorageFile(part.uri) as file:
            batches = self._batches(file, part)
            while rows < part.rows:
                try:
                    batch = next(batches, None)
                except _BROKEN as error:
                    if file.failed:
                        raise
                    batch, problem = None, str(error)
                if batch is None:
                    break
                yield self._table(batch, part, rows, schema)
                rows += batch.num_rows
        detail = f"row group {part.row_group} breaks after {rows} rows: {problem}"
        unread = (Row(part.key(row), reason="unreadable_shard", detail=detail) for row in range(rows, part.rows))
        yield from to_tables(unread, schema)

    def _files(self) -> tuple[SourceFile, ...]:
        return find_shards(self._config.uri, (".parquet",))

    def _first(self, opened: Iterable[_File | _BrokenFile]) -> _File:
        """The first file that can be read."""
        problems = []
        for file in opened:
            if isinstance(file, _File):
                return file
            problems.append(file.problem)
        raise DataError(f"source {self._config.uri!r}: no file can be read; the first: {problems[0]}")

    def _schema(self, first: _File) -> pa.Schema:
        """RAW columns and those to carry along, after the first file; `DataError` where it lacks one of them."""
        config, schema = self._config, first.schema
        own = [name for name in (config.image_column, config.caption_column, config.key_column) if name is not None]
        names = config.columns if config.columns is not None else [name for name in schema.names if name not in own]
        for name in (*own, *names):
            if schema.names.count(name) != 1:
                raise DataError(
                    f"{first.file.uri!r} has {schema.names.count(name)} columns {name!r}; it has {', '.join(schema.names)}"
                )
        clash = [name for name in names if name in RAW_SCHEMA.names]
        if clash:
            raise DataError(
                f"{first.file.uri!r}: column {clash[0]!r} cannot be carried; name those that shall be in `columns`"
            )
        for name, check, wanted in (
            (config.image_column, _is_picture, "pictures are binary"),
            (config.caption_column, _is_text, "captions are text"),
            (config.key_column, _is_text, "keys are text"),
        ):
            if name is not None and not check(schema.field(name).type):
                raise DataError(f"{first.file.uri!r}: column {name!r} is {schema.field(name).type}; {wanted}")
        carried = pa.schema([pa.field(name, _plain(schema.field(name).type)) for name in names])
        if config.id_column is not None and (
            config.id_column not in names or carried.field(config.id_column).type != pa.int64()
        ):
            raise DataError(f"{first.file.uri!r}: id_column {config.id_column!r} is no int64 column that is carried")
        return pa.schema([*RAW_SCHEMA, *carried])

    def _batches(self, file: StorageFile, part: RowGroup) -> Iterator[pa.RecordBatch]:
        """The row group in batches that hold READ_BYTES, by the mean size of its rows."""
        parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=_READ_BUFFER)
        group = parquet.metadata.row_group(part.row_group)
        rows = max(1, min(READ_ROWS, READ_BYTES * group.num_rows // max(1, group.total_byte_size)))
        config = self._config
        wanted = [config.image_column, config.caption_column, config.key_column, *part.carried.names]
        present = [name for name in parquet.schema_arrow.names if name in wanted]
        yield from parquet.iter_batches(rows, row_groups=[part.row_group], columns=present, use_threads=False)

    def _table(self, batch: pa.RecordBatch, part: RowGroup, rows_before: int, schema: pa.Schema) -> pa.Table:
        drift: list[str] = []
        file_name = part.name.rpartition("#")[0]
        keys = _texts(batch, self._config.key_column, drift)[0]
        images, paths = _pictures(batch, self._config.image_column, drift)
        captions, broken = _texts(batch, self._config.caption_column, drift)
        carried = [_conformed(batch, field, drift) for field in part.carried]
        problems: list[tuple[str | None, str | None]] = [
            ("schema_drift", f"{file_name}: {'; '.join(drift)}") if drift
            else ("invalid_utf8", f"column {self._config.caption_column!r} is not UTF-8") if row in broken
            else ("no_image", paths[row] or "the picture is null") if not image.is_valid
            else (None, None)
            for row, image in enumerate(images)
        ]  # fmt: skip
        own = [
            pa.array([key or part.key(row) for row, key in enumerate(keys.to_pylist(), rows_before)], pa.string()),
            images,
            captions,
            pa.array([reason for reason, _ in problems], pa.string()),
            pa.array([detail for _, detail in problems], pa.string()),
        ]
        return pa.table([*own, *carried], schema=schema)


def _open_footer(file: SourceFile) -> _File | _BrokenFile:
    with StorageFile(file.uri) as stream:
        try:
            footer = pq.read_metadata(stream)
            return _File(file, footer, footer.schema.to_arrow_schema())
        except _BROKEN as error:
            if stream.failed:
                raise
            return _BrokenFile(
                file, f"{file.name!r} is not readable Parquet, and how many rows it has is unknown: {error}"
            )


def _parts_of(file: SourceFile, carried: pa.Schema) -> list[RowGroup]:
    """Of one file; its footer, a fifth of a megabyte in memory, is not kept."""
    opened = _open_footer(file)
    if isinstance(opened, _BrokenFile):
        return [RowGroup(f"{file.name}#0", file.uri, 0, 0, 1, carried, file.size, opened.problem)]
    sizes = [opened.footer.row_group(group).num_rows for group in range(opened.footer.num_row_groups)]
    first_rows = accumulate(sizes, initial=0)
    return [
        RowGroup(f"{file.name}#{group}", file.uri, group, first_row, rows, carried, file.size)
        for group, (rows, first_row) in enumerate(zip(sizes, first_rows, strict=False))
        if rows > 0
    ]


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type without its encoding: dictionaries as their values."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_binary(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _is_string(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_text(kind: pa.DataType) -> bool:
    return _is_string(kind) or _is_binary(kind) or pa.types.is_null(kind)


def _is_picture(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_binary(kind.field(index).type)
    return _is_binary(kind) or pa.types.is_null(kind)


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    column = batch.column(name)
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _drifted(batch: pa.RecordBatch, name: str, drift: list[str]) -> None:
    kinds = {field.name: field.type for field in batch.schema}
    drift.append(f"column {name!r} is {kinds[name]} here" if name in kinds else f"there is no column {name!r}")


def _pictures(batch: pa.RecordBatch, name: str, drift: list[str]) -> tuple[pa.Array, Sequence[str | None]]:
    """The encoded pictures, and for those that are missing what there is instead."""
    missing: list[str | None] = [None] * batch.num_rows
    if name not in batch.schema.names or not _is_picture(batch.schema.field(name).type):
        _drifted(batch, name, drift)
        return pa.nulls(batch.num_rows, pa.large_binary()), missing
    column = _column(batch, name)
    if pa.types.is_struct(column.type):
        if column.type.get_field_index("path") >= 0:
            paths = pc.struct_field(column, "path").to_pylist()
            missing = [None if path is None else f"only the path {path!r} is there" for path in paths]
        column = pc.struct_field(column, "bytes")
    return column.cast(pa.large_binary()), missing


def _texts(batch: pa.RecordBatch, name: str | None, drift: list[str]) -> tuple[pa.Array, set[int]]:
    """The texts, and the rows where they are not UTF-8, which Arrow takes over unseen: their bad bytes are replaced."""
    nothing = pa.nulls(batch.num_rows, pa.string())
    if name is None:
        return nothing, set()
    if name not in batch.schema.names or not _is_text(batch.schema.field(name).type):
        _drifted(batch, name, drift)
        return nothing, set()
    raw = _column(batch, name).cast(pa.large_binary())
    try:
        return raw.cast(pa.string()), set()
    except pa.ArrowInvalid:
        read = [None if value is None else read_text(value) for value in raw.to_pylist()]
        texts = [None if text is None else text[0] for text in read]
        return pa.array(texts, pa.string()), {row for row, text in enumerate(read) if text is not None and not text[1]}


def _conformed(batch: pa.RecordBatch, field: pa.Field, drift: list[str]) -> pa.Array:
    """A carried column in the type of the first file; null where this file's is missing or not to be had in that type."""
    if field.name in batch.schema.names:
        column = _column(batch, field.name)
        if _widens(column.type, field.type):
            return column.cast(
                field.type, safe=False
            )  # integers beyond 2**53 are rounded where the first file has floats
    _drifted(batch, field.name, drift)
    return pa.nulls(batch.num_rows, field.type)


def _widens(kind: pa.DataType, target: pa.DataType) -> bool:
    """Whether one type can be taken for the other: by the types alone, so that all rows of a file are treated alike."""
    if kind == target or (_is_string(kind) and _is_string(target)):
        return True
    try:
        both = pa.unify_schemas([pa.schema([("x", kind)]), pa.schema([("x", target)])], promote_options="permissive")
    except pa.ArrowException:
        return False
    return both.field("x").type == target
