"""What every source of pictures and captions gives: parts that can be read apart, and RAW tables of one form.

A row that cannot be used is never left out: it comes with a `reason` and a sentence of `detail` instead. The reasons:

    no_image            nothing that could be a picture
    too_large           the file is larger than the source's bound
    invalid_utf8        a caption, a sidecar or a text column is not UTF-8
    bad_sidecar         the JSON beside a picture is not a JSON object
    bad_row             a line of a list is no record
    no_url, fetch_failed
    schema_drift        the file lacks a column that the first file has, or holds another type in it
    bad_member, bad_member_name, duplicate_member, repeated_key         what a tar holds
    bad_file_name, unknown_file                                         what a folder holds
    truncated_shard, unreadable_shard     the file ends early, or breaks; its rows before that are there
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

import pyarrow as pa
from pydantic import Field, model_validator

from unclip.config.base import Config
from unclip.utils import storage

READ_ROWS = 256
"""Rows of a RAW table, at most."""
READ_BYTES = 64 << 20
"""A RAW table is closed when its pictures have so many bytes."""

RAW_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image", pa.large_binary()),
        ("caption", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
"""The first columns of every table that a source yields; columns that the source carries along follow.

`key` is the name within the source (file name, tar key, FILE:ROW), `image` the encoded bytes as they came or null,
`caption` the text as it came or null, `reason` null for a row that may go on.
"""

PICTURE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"})

FieldType = Literal["string", "int64", "float64", "bool"]
_ARROW_TYPES = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_()}


@dataclass(frozen=True)
class Part:
    """What one task reads: a tar, a row group, some files of a folder, some rows of a list. At most 2**28 rows.

    Args:
        name: unique and stable within the source.
    """

    name: str


class Source(Protocol):
    """A set of pictures with captions. Its methods give the same in the same order whenever the input is the same."""

    def schema(self) -> pa.Schema:
        """Columns of all its tables: RAW_SCHEMA, then those carried along. Raises as `parts` does."""
        ...

    def parts(self) -> tuple[Part, ...]:
        """All parts, sorted. Reads listings, footers and lists, no pictures.

        Raises `DataError` where there is nothing to read, or a column that was asked for is missing.
        """
        ...

    def read(self, part: Any) -> Iterator[pa.Table]:
        """The rows of one of this source's own parts: tables of at most READ_ROWS rows.

        Raises `OSError` where the storage fails; reading the part again gives the same rows from the start.
        """
        ...


class SourceSettings(Config):
    """What the configurations of all sources have."""

    uri: str = Field(min_length=1)
    """Where it is: a folder, a file or a glob (`s3://bucket/laion/*.tar`), local or in an object store."""
    id_column: str | None = None
    """Carried int64 column that is the record's id; null = ids are counted from the row's place in the source."""


class FieldSettings(SourceSettings):
    """What the sources have whose records are JSON objects or lines of text."""

    fields: dict[str, FieldType] = Field(default_factory=dict)
    """Fields of a record that become columns, with their types; a value of another type is null there. All fields
    are in the column `metadata`, as JSON."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        taken = [name for name in self.fields if name in (*RAW_SCHEMA.names, "metadata")]
        if taken:
            raise ValueError(f"fields.{taken[0]}: a column of that name is there already")
        if self.id_column is not None and self.fields.get(self.id_column) != "int64":
            raise ValueError(f"id_column {self.id_column!r} is not a field with type int64; fields: {self.fields}")
        return self

    def table_schema(self) -> pa.Schema:
        """Columns of the source's tables."""
        further = [pa.field(name, _ARROW_TYPES[kind]) for name, kind in self.fields.items()]
        return pa.schema([*RAW_SCHEMA, pa.field("metadata", pa.string()), *further])

    def carried(self, record: Mapping[str, Any], metadata: str) -> dict[str, Any]:
        """The values of a record's further columns."""
        return {"metadata": metadata} | {name: convert(record.get(name), kind) for name, kind in self.fields.items()}


@dataclass(frozen=True)
class Row:
    """One row of a RAW table; `carried` has the values of the further columns, null where it has none."""

    key: str
    image: bytes | None = None
    caption: str | None = None
    reason: str | None = None
    detail: str | None = None
    carried: Mapping[str, Any] = field(default_factory=dict)


def to_tables(rows: Iterable[Row], schema: pa.Schema) -> Iterator[pa.Table]:
    """Tables of the rows, each as large as READ_ROWS and READ_BYTES allow."""
    held: list[Row] = []
    size = 0
    for row in rows:
        held.append(row)
        size += len(row.image or b"")
        if len(held) == READ_ROWS or size >= READ_BYTES:
            yield _to_table(held, schema)
            held, size = [], 0
    if held:
        yield _to_table(held, schema)


def _to_table(rows: list[Row], schema: pa.Schema) -> pa.Table:
    own = set(RAW_SCHEMA.names)
    values = ([getattr(row, name) if name in own else row.carried.get(name) for row in rows] for name in schema.names)
    return pa.table([pa.array(column, kind) for column, kind in zip(values, schema.types, strict=True)], schema=schema)


def convert(value: Any, kind: FieldType) -> Any:
    """A JSON value or a text as `kind`; None where it is not one."""
    try:
        if kind == "string":
            return value if value is None else printable(value) if isinstance(value, str) else to_json(value)
        if kind == "bool":
            return value if isinstance(value, bool) else {"true": True, "false": False}.get(str(value).lower())
        if value is None or isinstance(value, bool):
            return None
        if kind == "float64":
            return float(value)
        number = int(value)
        exact = isinstance(value, str) or number == value
        return number if exact and -(1 << 63) <= number < 1 << 63 else None
    except (TypeError, ValueError, OverflowError):
        return None


def to_json(value: Any) -> str:
    """Compact JSON that any encoding can hold; what JSON has no form for is written as text."""
    return json.dumps(value, separators=(",", ":"), default=str)


def read_text(content: bytes) -> tuple[str, bool]:
    """The text of UTF-8 bytes, without a byte order mark, and whether they are UTF-8: bad ones are replaced."""
    try:
        return content.decode("utf-8-sig"), True
    except UnicodeDecodeError:
        return content.decode("utf-8-sig", "replace"), False


def printable(text: str) -> str:
    """The text with what UTF-8 cannot hold written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def is_utf8(text: str) -> bool:
    """False where bytes that are not UTF-8 were read as lone surrogates, or JSON escapes spelt some."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def unsafe_name(name: str) -> str | None:
    """What is wrong with a file's name that came from outside; None for a plain relative one."""
    parts = name.replace("\\", "/").split("/")
    if not name or "\0" in name or not is_utf8(name):
        return "is no text"
    if parts[0] == "" or parts[0].endswith(":"):
        return "is absolute"
    return "leaves its folder" if ".." in parts else None


class StorageFile:
    """A file opened for reading that knows whether its storage failed.

    Parsers report a broken connection and a broken file alike; only the second is a fact about the data.
    """

    def __init__(self, uri: str) -> None:
        fs, path = storage.filesystem(uri)
        self.uri = uri
        self.failed = False
        self._file = fs.open(path, "rb")

    def read(self, size: int = -1) -> bytes:
        try:
            content: bytes = self._file.read(size)
        except Exception as error:  # every back end has errors of its own
            self.failed = True
            raise OSError(f"{self.uri!r} cannot be read: {error}") from error
        return content

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self._file.close()

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
