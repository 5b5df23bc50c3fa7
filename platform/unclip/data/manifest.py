"""What a folder of Parquet records holds: the fragments a training order is made of, and reading them.

A folder that our jobs made says so in its `manifest.json`: one listing and one footer are all that is read, however many
shards there are. Of other folders every footer is read.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from unclip.utils import storage

FACTS_FILE = "manifest.json"
_FOOTER_THREADS = 32
_READ_THREADS = 16
"""Files that are read at once: of an object store, one request alone brings a tenth of what a node can take."""
_WORK_FOLDERS = ("_ingest", "_parts", "_units")
"""Where jobs keep what is not ready yet."""

Slice = tuple[int, int, int]
"""(fragment index, first row, row after the last), rows counted inside the fragment."""


class DataError(ValueError):
    """Records are missing, unreadable or not what was asked for; the message names the folder, file, column or id."""


class ReadError(DataError):
    """A file of records could not be read, which may work the next time: its store did not answer."""


class Fragment(NamedTuple):
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
        schema: the columns that every file has, in the first file's order and with its types.
        facts: what `manifest.json` beside the shards says but for the shards themselves (row counts, licence, CLIP
            fingerprint, embedding statistics); empty where there is none.
    """

    uri: str
    fragments: tuple[Fragment, ...]
    schema: pa.Schema
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return sum(fragment.rows for fragment in self.fragments)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.schema.names)


def scan(uri: str, columns: Sequence[str] = (), *, may_be_empty: bool = False) -> Manifest:
    """Finds the records of the `*.parquet` files directly under `uri` (local or object store).

    Raises `DataError` where the folder is missing, unfinished, or holds no Parquet file; a file is no readable Parquet or
    not the one that `manifest.json` lists; one of `columns` is missing or changes its type between files whose footers
    are read; or there are no rows. With `may_be_empty` a finished folder of our jobs may have no file and no rows.
    """
    uri = storage.absolute(uri)
    sizes = _sizes(uri)
    files = [name for name in sizes if name.endswith(".parquet")]
    facts = _facts(uri) if FACTS_FILE in sizes else {}
    unfinished = [name for name in _WORK_FOLDERS if name in sizes]
    if unfinished and not facts:
        raise DataError(
            f"data folder {uri!r} is unfinished: it has {unfinished[0]}/ but no {FACTS_FILE}; run the job that writes it "
            "again, which goes on where it ended"
        )
    shards = facts.pop("shards", None)
    if not files and (shards is None or not may_be_empty):
        raise DataError(f"data folder {uri!r} holds no *.parquet file")
    schema, fragments = (
        _from_footers(uri, files, columns) if shards is None else _from_shards(uri, shards, sizes, columns)
    )
    if not fragments and not may_be_empty:
        raise DataError(f"data folder {uri!r}: its {len(files)} Parquet files hold no rows")
    return Manifest(uri, fragments, schema, facts)


def read_slices(manifest: Manifest, slices: Iterable[Slice], columns: Sequence[str]) -> pa.Table:
    """The rows of `slices` one after the other, only `columns`; as `SliceReader.read`."""
    return SliceReader([manifest], columns).read([slices])


def records_identity(manifest: Manifest, *, in_place: bool = False) -> str:
    """A hash that changes when the records do, and not when they are copied: of what can be told without reading them.

    That is the hash of their content, where the folder's manifest has one, else the names and sizes of the files; and the
    rows of their row groups. So of other people's folders it misses what is replaced by exactly as many rows and bytes;
    `in_place` adds the files' times of change (object stores: entity tags), which tell that, but not copies from changes.
    """
    content = manifest.facts.get("records_sha256") or _versions(manifest, in_place=in_place)
    rows = [[name, [part.rows for part in parts]] for name, parts in groupby(manifest.fragments, key=lambda f: f.file)]
    return hashlib.sha256(json.dumps([content, rows]).encode()).hexdigest()


def _versions(manifest: Manifest, *, in_place: bool) -> list[tuple[str, int, str | None]]:
    """Name and size of each file with rows, and with `in_place` what changes whenever it is written."""
    fs, folder = storage.filesystem(manifest.uri)
    entries = {posixpath.basename(str(entry["name"])): entry for entry in fs.ls(folder, detail=True)}
    files = ((file, entries[file]) for file in dict.fromkeys(fragment.file for fragment in manifest.fragments))
    return [
        (file, entry["size"], str(entry.get("ETag") or entry.get("mtime")) if in_place else None)
        for file, entry in files
    ]


def check_same_types(manifests: Sequence[Manifest], columns: Sequence[str]) -> None:
    """Raises `DataError` where one of `columns` has other types in these folders, whose rows could not be mixed."""
    for manifest in manifests[1:]:
        _check_columns(manifest.uri, manifest.schema, manifests[0].schema, columns, first_name=manifests[0].uri)


class SliceReader:
    """Reads rows of one folder or several, only `columns`.

    It keeps the row group that each folder's slices ended in: what is read next mostly goes on there.
    """

    def __init__(self, manifests: Sequence[Manifest], columns: Sequence[str]) -> None:
        self._folders = [_FolderReader(manifest, columns) for manifest in manifests]

    def read(self, slices: Sequence[Iterable[Slice]]) -> pa.Table:
        """The rows of each folder's slices one after the other, folder after folder.

        Every file is opened once for each run of slices in it, `_READ_THREADS` of them at a time. Raises `DataError`
        naming the file where it cannot be read, or its columns are not those of the folder's first file.
        """
        runs = [run for folder, parts in zip(self._folders, slices, strict=True) for run in folder.runs(parts)]
        if not runs:
            raise DataError("no slices to read")
        with ThreadPoolExecutor(_READ_THREADS) as threads:
            return pa.concat_tables([table for tables in threads.map(_FolderRun.read, runs) for table in tables])


class _FolderReader:
    def __init__(self, manifest: Manifest, columns: Sequence[str]) -> None:
        self.manifest = manifest
        self.columns = list(columns)
        self.kept: tuple[int, pa.Table] | None = None

    def runs(self, slices: Iterable[Slice]) -> list[_FolderRun]:
        """The slices, those in a row of the same file together. Each run is to be read once."""
        fragments = self.manifest.fragments
        kept, self.kept = self.kept, None
        runs = [_FolderRun(self, list(run)) for _, run in groupby(slices, key=lambda part: fragments[part[0]].file)]
        if runs:
            runs[0].kept = kept
            runs[-1].is_last = True
        return runs


@dataclass
class _FolderRun:
    """Slices of one file.

    Args:
        folder: whose file it is.
        slices: at least one.
        kept: the row group that the folder's slices ended in before, and its fragment.
        is_last: whether the folder's slices end with this run.
    """

    folder: _FolderReader
    slices: list[Slice]
    kept: tuple[int, pa.Table] | None = None
    is_last: bool = False

    def read(self) -> list[pa.Table]:
        """The rows of each slice."""
        wanted = [fragment for fragment, _, _ in self.slices]
        known = [self.kept[1]] if self.kept is not None and self.kept[0] == wanted[0] else []
        groups = known + self._row_groups(wanted[len(known) :])
        fragment, _, stop = self.slices[-1]
        if self.is_last and stop < self.folder.manifest.fragments[fragment].rows:
            self.folder.kept = fragment, groups[-1]
        return [group.slice(start, stop - start) for (_, start, stop), group in zip(self.slices, groups, strict=True)]

    def _row_groups(self, wanted: Sequence[int]) -> list[pa.Table]:
        if not wanted:
            return []
        manifest, columns = self.folder.manifest, self.folder.columns
        fs, folder = storage.filesystem(manifest.uri)
        name = manifest.fragments[wanted[0]].file
        path = posixpath.join(manifest.uri, name)
        groups = []
        try:
            with fs.open(posixpath.join(folder, name), "rb") as stream:
                file = pq.ParquetFile(stream)
                _check_columns(path, file.schema_arrow, manifest.schema, columns)
                for fragment in wanted:
                    _, index, rows = manifest.fragments[fragment]
                    table = file.read_row_group(index, columns=columns)
                    # Without what only some files say, as `not null`: what is joined agrees in types, no more.
                    group = pa.table([table.column(column) for column in columns], names=columns)
                    if group.num_rows != rows:
                        raise DataError(f"{path!r}: row group {index} has {group.num_rows} rows, expected {rows}")
                    groups.append(group)
        except (OSError, pa.ArrowException) as error:
            raise ReadError(f"{path!r} cannot be read: {error}") from error
        return groups


def _sizes(uri: str) -> dict[str, int]:
    """Names directly under a folder, sorted, and their sizes in bytes; one listing."""
    fs, path = storage.filesystem(uri)
    try:
        entries = fs.ls(path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"data folder {uri!r} does not exist") from None
    found = {str(entry["name"]).rstrip("/"): int(entry["size"] or 0) for entry in entries}
    found.pop(path.rstrip("/"), None)  # some tools mark a folder on an object store by an empty object of its name
    return {posixpath.basename(name): found[name] for name in sorted(found)}


def _facts(uri: str) -> dict[str, Any]:
    path = storage.join(uri, FACTS_FILE)
    try:
        facts = storage.read_json(path)
    except ValueError as error:
        raise DataError(f"{path!r} is no JSON: {error}") from error
    if not isinstance(facts, dict):
        raise DataError(f"{path!r} is no JSON object")
    return facts


def _from_footers(uri: str, files: Sequence[str], columns: Sequence[str]) -> tuple[pa.Schema, tuple[Fragment, ...]]:
    with ThreadPoolExecutor(min(_FOOTER_THREADS, len(files))) as threads:
        found = list(threads.map(lambda name: _columns_and_rows(uri, name), files))
    first = found[0][0]
    for name, (schema, _) in zip(files, found, strict=True):
        _check_columns(posixpath.join(uri, name), schema, first, columns)
    shared = set.intersection(*(set(schema.names) for schema, _ in found))
    fragments = tuple(
        Fragment(name, group, rows)
        for name, (_, sizes) in zip(files, found, strict=True)
        for group, rows in enumerate(sizes)
        if rows > 0
    )
    return pa.schema([column for column in first if column.name in shared]), fragments


def _columns_and_rows(uri: str, name: str) -> tuple[pa.Schema, list[int]]:
    """Of one file, and the rows of each row group; its footer, a fifth of a megabyte in memory, is not kept."""
    footer = _read_footer(uri, name)
    rows = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    return footer.schema.to_arrow_schema().remove_metadata(), rows


def _from_shards(
    uri: str, shards: Sequence[Mapping[str, Any]], sizes: Mapping[str, int], columns: Sequence[str]
) -> tuple[pa.Schema, tuple[Fragment, ...]]:
    """From the shards that `manifest.json` lists, whose sizes must be right; the first one's footer has the columns."""
    path = posixpath.join(uri, FACTS_FILE)
    try:
        fragments = tuple(_shard_fragments(uri, shards, sizes))
        listed = {shard["file"] for shard in shards}
    except (KeyError, TypeError) as error:
        raise DataError(f"{path!r}: 'shards' is not a list of files with their bytes and row groups") from error
    unlisted = [name for name in sizes if name.endswith(".parquet") and name not in listed]
    if unlisted:
        raise DataError(f"{posixpath.join(uri, unlisted[0])!r} is not among the shards that {path!r} lists")
    if not listed:
        return pa.schema([]), ()
    first = min(listed)
    schema = _read_footer(uri, first).schema.to_arrow_schema().remove_metadata()
    _check_columns(posixpath.join(uri, first), schema, schema, columns)
    return schema, fragments


def _shard_fragments(uri: str, shards: Sequence[Mapping[str, Any]], sizes: Mapping[str, int]) -> Iterator[Fragment]:
    for shard in sorted(shards, key=lambda shard: str(shard["file"])):
        name, size = shard["file"], shard["bytes"]
        if name not in sizes:
            raise DataError(f"{posixpath.join(uri, name)!r} is missing: {FACTS_FILE} lists it")
        if sizes[name] != size:
            raise DataError(f"{posixpath.join(uri, name)!r} has {sizes[name]} bytes, {FACTS_FILE} says {size}")
        if sum(shard["row_groups"]) != shard["rows"]:
            raise DataError(f"{posixpath.join(uri, name)!r}: its row groups in {FACTS_FILE} do not have its rows")
        yield from (Fragment(name, group, rows) for group, rows in enumerate(shard["row_groups"]) if rows)


def _read_footer(uri: str, name: str) -> pq.FileMetaData:
    fs, folder = storage.filesystem(uri)
    try:
        with fs.open(posixpath.join(folder, name), "rb") as stream:
            return pq.read_metadata(stream)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{posixpath.join(uri, name)!r} is not readable Parquet: {error}") from error


def _check_columns(
    path: str, schema: pa.Schema, first: pa.Schema, columns: Sequence[str], *, first_name: str = "the first file"
) -> None:
    missing = [name for name in columns if name not in schema.names]
    if missing:
        raise DataError(f"{path!r} has no column {', '.join(map(repr, missing))}; it has {', '.join(schema.names)}")
    for name in columns:
        if schema.field(name).type != first.field(name).type:
            raise DataError(
                f"{path!r}: column {name!r} is {schema.field(name).type}, in {first_name} {first.field(name).type}"
            )
