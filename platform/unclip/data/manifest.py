"""What a folder of Parquet records holds, found from its footers alone: the fragments a training order is made of."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from unclip.utils import storage

FACTS_FILE = "manifest.json"
_FOOTER_THREADS = 32

Slice = tuple[int, int, int]
"""(fragment index, first row, row after the last), rows counted inside the fragment."""


class DataError(ValueError):
    """Records are missing, unreadable or not what was asked for; the message names the folder, file, column or id."""


@dataclass(frozen=True)
class Fragment:
    """One Parquet row group: the unit that is read and shuffled.

    Args:
        file: name under the manifest's folder.
        row_group: index inside the file.
        rows: number of rows, at least 1.
    """

    file: str
    row_group: int
    rows: int


@dataclass(frozen=True)
class Manifest:
    """The fragments of a folder, files sorted by name.

    Args:
        uri: the folder, absolute.
        columns: names of the columns that every file has, in the first file's order.
        facts: what `manifest.json` beside the shards says (row counts, licence, CLIP fingerprint, embedding
            statistics); empty where there is none.
    """

    uri: str
    fragments: tuple[Fragment, ...]
    columns: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return sum(fragment.rows for fragment in self.fragments)


def scan(uri: str, columns: Sequence[str] = ()) -> Manifest:
    """Reads the footers of all `*.parquet` files directly under `uri` (local or object store).

    Raises `DataError` where the folder is missing or holds no Parquet file, a file is no readable Parquet, one of
    `columns` is missing from a file or changes its type between files, or there are no rows.
    """
    uri = storage.absolute(uri)
    fs, path = storage.filesystem(uri)
    if not fs.isdir(path):
        raise DataError(f"data folder {uri!r} does not exist")
    names = storage.names(uri)
    files = [name for name in names if name.endswith(".parquet")]
    if not files:
        raise DataError(f"data folder {uri!r} holds no *.parquet file")
    with ThreadPoolExecutor(min(_FOOTER_THREADS, len(files))) as threads:
        footers = list(threads.map(lambda name: _read_footer(uri, name), files))
    schemas = [footer.schema.to_arrow_schema() for footer in footers]
    for name, schema in zip(files, schemas, strict=True):
        _check_columns(posixpath.join(uri, name), schema, schemas[0], columns)
    fragments = tuple(
        Fragment(name, group, footer.row_group(group).num_rows)
        for name, footer in zip(files, footers, strict=True)
        for group in range(footer.num_row_groups)
        if footer.row_group(group).num_rows > 0
    )
    if not fragments:
        raise DataError(f"data folder {uri!r}: its {len(files)} Parquet files hold no rows")
    shared = set.intersection(*(set(schema.names) for schema in schemas))
    facts = storage.read_json(storage.join(uri, FACTS_FILE)) if FACTS_FILE in names else {}
    return Manifest(uri, fragments, tuple(name for name in schemas[0].names if name in shared), facts)


def read_slices(manifest: Manifest, slices: Iterable[Slice], columns: Sequence[str]) -> pa.Table:
    """The rows of `slices` one after the other, only `columns`. Every file is opened once for each run of slices in it.

    Raises `DataError` naming the file where it cannot be read.
    """
    fs, folder = storage.filesystem(manifest.uri)
    tables = []
    for name, run in groupby(slices, key=lambda part: manifest.fragments[part[0]].file):
        try:
            with fs.open(posixpath.join(folder, name), "rb") as stream:
                file = pq.ParquetFile(stream)
                for fragment, start, stop in run:
                    group = file.read_row_group(manifest.fragments[fragment].row_group, columns=list(columns))
                    tables.append(group.slice(start, stop - start))
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{posixpath.join(manifest.uri, name)!r} cannot be read: {error}") from error
    if not tables:
        raise DataError(f"{manifest.uri!r}: no slices to read")
    return pa.concat_tables(tables)


def _read_footer(uri: str, name: str) -> pq.FileMetaData:
    fs, folder = storage.filesystem(uri)
    try:
        with fs.open(posixpath.join(folder, name), "rb") as stream:
            return pq.read_metadata(stream)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{posixpath.join(uri, name)!r} is not readable Parquet: {error}") from error


def _check_columns(path: str, schema: pa.Schema, first: pa.Schema, columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in schema.names]
    if missing:
        raise DataError(f"{path!r} has no column {', '.join(map(repr, missing))}; it has {', '.join(schema.names)}")
    for name in columns:
        if schema.field(name).type != first.field(name).type:
            raise DataError(
                f"{path!r}: column {name!r} is {schema.field(name).type}, in the first file {first.field(name).type}"
            )
