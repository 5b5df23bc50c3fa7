"""What lies in OUT/_ingest while records are made: each part of the sources judged, its hashes beside it.

Three files a part, named by its number: `kept/` (records, in pieces), `hashes/` (a row for each record: all that finding
duplicates and cutting shards need) and `rejected/`; each only where it has rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unclip.config.base import ConfigError
from unclip.data.ingest.duplicates import HASHES
from unclip.data.ingest.records import REJECTED_SCHEMA, RecordPolicy, judge
from unclip.data.ingest.shards import Piece, ShardPolicy, cut, row_bytes, write_if_any
from unclip.data.manifest import DataError
from unclip.data.sources.base import Part, Source
from unclip.utils import storage

WORK_FOLDER = "_ingest"
ROW_BITS, PART_BITS, SOURCE_BITS = 28, 27, 8
"""Of an id that is counted: 63 bits, from the lowest; and a place is a part's number above the row's."""

_STAGED = pa.schema([*HASHES, ("bytes", pa.int64()), ("piece", pa.int32())])


def staged_file(out: str, kind: str, part: int) -> str:
    """Address of a part's `kept`, `hashes` or `rejected` file."""
    return storage.join(out, WORK_FOLDER, kind, f"{part:08d}.parquet")


def record_schema(sources: Iterable[tuple[str, pa.Schema]], policy: RecordPolicy) -> pa.Schema:
    """Columns of the records of several sources, each with its address and RAW schema: what a source lacks is null.

    Raises `ConfigError` naming a source that the policy does not fit, `DataError` where sources have a column of one name
    with different types.
    """
    kept = [_kept_schema(uri, schema, policy) for uri, schema in sources]
    try:
        return pa.unify_schemas(kept)
    except pa.ArrowException as error:
        raise DataError(f"the sources do not go together: {error}") from None


def _kept_schema(uri: str, schema: pa.Schema, policy: RecordPolicy) -> pa.Schema:
    try:
        kept, _ = judge(schema.empty_table(), np.zeros(0, np.int64), "", "", policy)
    except (ConfigError, DataError) as error:
        raise type(error)(f"source {uri!r}: {error}") from None
    return kept.schema.remove_metadata()


class PartStager:
    """Judges one part and stages what comes of it.

    Args:
        out: the folder of the records.
        number: of the part among those of all sources; `first_id` is the id of its first row.
        schema: columns of the records.
    """

    def __init__(
        self, out: str, *, number: int, first_id: int, schema: pa.Schema, policy: RecordPolicy, shards: ShardPolicy
    ) -> None:
        self._out, self._number, self._first_id = out, number, first_id
        self._schema, self._policy, self._shards = schema, policy, shards
        self._rows = self._kept = self._pieces = 0
        self._rejected: list[pa.Table] = []
        self._hashes: list[pa.Table] = []

    def run(self, source: Source, part: Part, *, name: str, id_column: str | None) -> dict[str, Any]:
        """Stages the part; returns its `rows`, those `kept`, and those `rejected` by reason.

        Args:
            name: of the source. id_column: of the source that has its own ids; rows without one are rejected as `no_id`.
        """
        write_if_any(
            staged_file(self._out, "kept", self._number), self._schema, self._pieces_of(source, part, name, id_column)
        )
        write_if_any(staged_file(self._out, "hashes", self._number), _STAGED, self._hashes)
        write_if_any(staged_file(self._out, "rejected", self._number), REJECTED_SCHEMA, self._rejected)
        reasons = Counter(reason for table in self._rejected for reason in table.column("reason").to_pylist())
        return {"rows": self._rows, "kept": self._kept, "rejected": dict(sorted(reasons.items()))}

    def _pieces_of(self, source: Source, part: Part, name: str, id_column: str | None) -> Iterator[pa.Table]:
        for raw in source.read(part):
            raw, ids = _with_ids(raw, self._first_id + self._rows, id_column)
            kept, rejected = judge(raw, ids, name, part.name, self._policy)
            self._rows += raw.num_rows
            if self._rows > 1 << ROW_BITS:
                raise DataError(f"part {part.name!r} of {name!r} has more than {1 << ROW_BITS} rows")
            if rejected.num_rows:
                self._rejected.append(rejected)
            for piece in cut(conform(kept, self._schema), self._shards):
                self._hashes.append(self._hashes_of(piece))
                self._kept += piece.num_rows
                self._pieces += 1
                yield piece

    def _hashes_of(self, piece: pa.Table) -> pa.Table:
        first = (self._number << ROW_BITS) + self._kept
        sides = (piece.column(side).cast(pa.int64()) for side in ("width", "height"))
        columns = {
            "place": np.arange(first, first + piece.num_rows),
            **{column: piece.column(column) for column in ("id", "content_hash", "perceptual_hash")},
            "pixels": pc.multiply(*sides),
            "bytes": row_bytes(piece),
            "piece": np.full(piece.num_rows, self._pieces, np.int32),
        }
        return pa.table(columns, schema=_STAGED)


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with the columns of `schema`, in its order; null where it has none."""
    columns = [
        table.column(field.name) if field.name in table.column_names else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, names=schema.names).cast(schema)


def read_hashes(out: str, parts: Sequence[int]) -> pa.Table:
    """The hashes of the records of some staged parts: HASHES, `bytes` and `piece`."""
    tables = [_STAGED.empty_table()]
    for part in parts:
        with storage.local_file(staged_file(out, "hashes", part)) as path:
            tables.append(pq.read_table(path))
    return pa.concat_tables(tables)


def pieces_of(hashes: pa.Table, removed: npt.NDArray[np.int64]) -> list[Piece]:
    """The pieces of some parts, by their rows' hashes, less the rows at the places `removed` (ascending)."""
    place, size = hashes.column("place").to_numpy(), hashes.column("bytes").to_numpy()
    piece = hashes.column("piece").to_numpy()
    is_kept = ~np.isin(place, removed)
    part = place >> ROW_BITS
    if not len(place):
        return []
    starts = np.flatnonzero(np.concatenate(([True], (np.diff(piece) != 0) | (np.diff(part) != 0))))
    ends = np.append(starts[1:], len(place))
    rows, sizes = np.add.reduceat(is_kept.astype(np.int64), starts), np.add.reduceat(size * is_kept, starts)
    columns = (part[starts], piece[starts], place[starts], ends - starts, rows, sizes)
    return [Piece(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]


def _with_ids(raw: pa.Table, first: int, id_column: str | None) -> tuple[pa.Table, npt.NDArray[np.int64]]:
    """The rows with their ids; rows that lack the id they should have get a counted one, and the reason `no_id`."""
    counted = np.arange(first, first + raw.num_rows, dtype=np.int64)
    if id_column is None:
        return raw, counted
    own = raw.column(id_column)
    lacks = pc.and_(own.is_null(), raw.column("reason").is_null())
    for name, text in (("reason", "no_id"), ("detail", f"column {id_column!r} is null")):
        column = pc.if_else(lacks, text, raw.column(name))
        raw = raw.set_column(raw.schema.get_field_index(name), name, column)
    return raw, pc.coalesce(own, pa.array(counted)).to_numpy()
