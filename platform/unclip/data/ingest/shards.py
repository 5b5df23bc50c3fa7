"""The final Parquet shards: cut from what was staged, without the rows that are left out, the same bytes every time.

What was staged comes in *pieces*, its row groups. A row group of a shard is made of whole pieces in the order of the
sources' rows, so which rows are in which shard follows from the records alone, not from who wrote them or when.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from unclip.config.base import Config
from unclip.utils import storage

PIECES_PER_GROUP = 4
"""A piece is at most this fraction of a row group, so that row groups come close to their bounds."""
_REPEATED = ("source", "format", "reason", "part")  # worth a dictionary
_COMPARED = ("id", "width", "height", "place")  # worth their least and greatest values

T = TypeVar("T")


class ShardPolicy(Config):
    """How large shards and their row groups are; bounds hold but for a single record that is larger."""

    shard_bytes: int = Field(default=512 * 2**20, ge=1)
    """Bytes of a shard, at most."""
    row_group_bytes: int = Field(default=64 * 2**20, ge=1, lt=2**30)
    """Bytes of a row group, at most: what training reads and shuffles as one."""
    row_group_rows: int = Field(default=1024, ge=1)
    """Records of a row group, at most."""

    @model_validator(mode="after")
    def _groups_fit_shards(self) -> Self:
        if self.row_group_bytes > self.shard_bytes:
            raise ValueError(f"row_group_bytes = {self.row_group_bytes} is more than shard_bytes = {self.shard_bytes}")
        return self


class Piece(NamedTuple):
    """A staged row group, and what is left of it.

    Args:
        part: number of the staged part; row_group: number inside it.
        place: of its first row; the others follow.
        staged_rows: rows with those that are left out.
        rows, bytes: without them.
    """

    part: int
    row_group: int
    place: int
    staged_rows: int
    rows: int
    bytes: int


class Shard(NamedTuple):
    """A file to write: the pieces of each of its row groups."""

    file: str
    row_groups: tuple[tuple[Piece, ...], ...]

    @property
    def rows(self) -> int:
        return sum(piece.rows for group in self.row_groups for piece in group)


def row_bytes(table: pa.Table) -> npt.NDArray[np.int64]:
    """(N,) bytes of each record: of its picture, and the mean of all else."""
    if not table.num_rows:
        return np.zeros(0, np.int64)
    pictures = pc.binary_length(table.column("image")).to_numpy().astype(np.int64)
    return pictures + -(-table.drop_columns("image").nbytes // table.num_rows)


def cut(table: pa.Table, policy: ShardPolicy) -> Iterator[pa.Table]:
    """The table in pieces."""
    most_rows = max(1, policy.row_group_rows // PIECES_PER_GROUP)
    most_bytes = policy.row_group_bytes // PIECES_PER_GROUP
    sizes = row_bytes(table).tolist()
    start = 0
    for rows in packed(sizes, lambda size: (1, size), (most_rows, most_bytes)):
        yield table.slice(start, len(rows))
        start += len(rows)


def plan_shards(pieces: Iterable[Piece], policy: ShardPolicy) -> list[Shard]:
    """Which pieces go into which row group of which shard, all in their order; pieces without rows are passed over."""
    filled = (piece for piece in pieces if piece.rows)
    limits = (policy.row_group_rows, policy.row_group_bytes)
    groups = packed(filled, lambda piece: (piece.rows, piece.bytes), limits)
    shards = list(packed(groups, lambda group: (sum(piece.bytes for piece in group),), (policy.shard_bytes,)))
    digits = max(5, len(str(len(shards))))  # so that their names sort in their order
    return [Shard(f"data-{number:0{digits}d}.parquet", tuple(shard)) for number, shard in enumerate(shards)]


def packed(
    items: Iterable[T], weigh: Callable[[T], tuple[int, ...]], limits: tuple[int, ...]
) -> Iterator[tuple[T, ...]]:
    """Consecutive items together as long as no sum of their weights passes its limit; at least one item each."""
    held: list[T] = []
    sums = [0] * len(limits)
    for item in items:
        weights = weigh(item)
        if held and any(have + more > limit for have, more, limit in zip(sums, weights, limits, strict=True)):
            yield tuple(held)
            held, sums = [], [0] * len(limits)
        held.append(item)
        sums = [have + more for have, more in zip(sums, weights, strict=True)]
    if held:
        yield tuple(held)


def write_shard(
    folder: str, shard: Shard, schema: pa.Schema, removed: npt.NDArray[np.int64], staged: Callable[[int], str]
) -> dict[str, Any]:
    """Writes a shard and returns its entry of the manifest.

    Args:
        removed: places that are left out, ascending.
        staged: address of a staged part by its number.
    """
    with ExitStack() as files:
        read = _PieceReader(staged, files)
        tables = (
            pa.concat_tables([_without(read(piece), piece, removed) for piece in group]) for group in shard.row_groups
        )
        return write_tables(storage.join(folder, shard.file), schema, tables)


def write_tables(uri: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> dict[str, Any]:
    """One Parquet row group for each table; equal tables give equal bytes. The file appears whole or not at all.

    Nothing is compressed: pictures are already, and training reads the rest in every epoch.
    Returns `file` (name), `rows`, `bytes`, `sha256` and `row_groups` (rows of each).
    """
    schema = schema.remove_metadata()
    row_groups = []
    with storage.local_target(uri) as path:
        dictionaries = [name for name in _REPEATED if name in schema.names]
        statistics = [name for name in _COMPARED if name in schema.names]
        with pq.ParquetWriter(
            path, schema, compression="none", use_dictionary=dictionaries, write_statistics=statistics
        ) as writer:
            for table in tables:
                # Page boundaries follow a column's chunks, which say only how the table came about.
                writer.write_table(table.cast(schema).combine_chunks(), row_group_size=max(1, table.num_rows))
                row_groups.append(table.num_rows)
        size, digest = path.stat().st_size, _sha256(path)
    return {
        "file": uri.rsplit("/", 1)[-1],
        "rows": sum(row_groups),
        "bytes": size,
        "sha256": digest,
        "row_groups": row_groups,
    }


def write_if_any(uri: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> dict[str, Any] | None:
    """`write_tables`; no file and None where there are no tables."""
    iterator = iter(tables)
    first = next(iterator, None)
    return None if first is None else write_tables(uri, schema, chain([first], iterator))


def records_sha256(shards: Sequence[dict[str, Any]]) -> str:
    """One hash for all shards, in their order."""
    return hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()


class _PieceReader:
    """Reads pieces; consecutive ones of a part through one open file."""

    def __init__(self, staged: Callable[[int], str], files: ExitStack) -> None:
        self._staged = staged
        self._files = files
        self._part: int | None = None
        self._file: pq.ParquetFile | None = None

    def __call__(self, piece: Piece) -> pa.Table:
        if piece.part != self._part:
            self._files.close()
            fs, path = storage.filesystem(self._staged(piece.part))
            self._file = pq.ParquetFile(self._files.enter_context(fs.open(path, "rb")))
            self._part = piece.part
        assert self._file is not None
        return self._file.read_row_group(piece.row_group)


def _without(table: pa.Table, piece: Piece, removed: npt.NDArray[np.int64]) -> pa.Table:
    start, stop = np.searchsorted(removed, [piece.place, piece.place + piece.staged_rows])
    if start == stop:
        return table
    return table.take(np.delete(np.arange(piece.staged_rows), removed[start:stop] - piece.place))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
