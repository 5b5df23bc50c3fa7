"""The rows that are not kept, with the reason: those that were rejected, and the duplicates with what is kept instead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unclip.data.ingest.pictures import thumbnail
from unclip.data.ingest.records import REJECTED_SCHEMA, RecordPolicy
from unclip.data.ingest.shards import packed, write_tables
from unclip.data.ingest.staging import ROW_BITS, staged_file
from unclip.utils import storage

QUARANTINE_FOLDER = "quarantine"
MOST_ROWS = 2**16
"""Rows of a quarantine table, unless one part has more."""

_DETAILS = {
    "duplicate": "another record has the same pixels; record {kept_id} is kept",
    "near_duplicate": "its perceptual hash is {distance} bits from that of record {kept_id}, which is kept",
    "duplicate_id": "an earlier row has the id {kept_id} too",
}


def write_quarantine(
    out: str, block: int, parts: Sequence[tuple[int, str]], removed: pa.Table, policy: RecordPolicy
) -> list[dict[str, Any]]:
    """Writes the quarantine of a block of parts, in their order; returns the entries of the manifest.

    Args:
        block: number that names the tables.
        parts: number and name of each part.
        removed: REMOVED of the block's places.
    """
    tables = (table for part, name in parts for table in _rows_of(out, part, name, removed, policy))
    files = packed(tables, lambda table: (table.num_rows,), (MOST_ROWS,))
    folder = storage.join(out, QUARANTINE_FOLDER)
    return [
        write_tables(storage.join(folder, f"part-{block:05d}-{number:03d}.parquet"), REJECTED_SCHEMA, file)
        for number, file in enumerate(files)
    ]


def _rows_of(out: str, part: int, name: str, removed: pa.Table, policy: RecordPolicy) -> Iterator[pa.Table]:
    rejected = staged_file(out, "rejected", part)
    if storage.exists(rejected):
        with storage.local_file(rejected) as path:
            yield pq.read_table(path)
    place = removed.column("place").to_numpy()
    start, stop = np.searchsorted(place, [part << ROW_BITS, (part + 1) << ROW_BITS])
    if start < stop:
        yield _duplicates(staged_file(out, "kept", part), name, removed.slice(start, stop - start), policy)


def _duplicates(staged: str, part: str, removed: pa.Table, policy: RecordPolicy) -> pa.Table:
    """The removed rows of one part as rejected ones; the first of each reason with thumbnails, as rejected rows have."""
    reasons = removed.column("reason").to_pylist()
    fs, path = storage.filesystem(staged)
    with fs.open(path, "rb") as stream:
        file = pq.ParquetFile(stream)
        rows = removed.column("place").to_numpy() & ((1 << ROW_BITS) - 1)
        named = file.read(columns=["id", "source", "key", "caption"]).take(rows)
        pictures = _pictures(file, rows, _first_of_each(reasons, policy.thumbnails))
    small = {row: thumbnail(picture, policy.pictures.max_pixels) for row, picture in pictures.items()}
    columns = {
        **{column: named.column(column) for column in ("id", "source", "key", "caption")},
        "part": [part] * len(reasons),
        "reason": removed.column("reason"),
        "detail": [_DETAILS[row["reason"]].format_map(row) for row in removed.to_pylist()],
        "thumbnail": pa.array([small.get(row) for row in range(len(reasons))], pa.large_binary()),
    }
    return pa.table({name: columns[name] for name in REJECTED_SCHEMA.names}, schema=REJECTED_SCHEMA)


def _first_of_each(reasons: list[str], most: int) -> list[int]:
    seen: Counter[str] = Counter()
    chosen = []
    for row, reason in enumerate(reasons):
        seen[reason] += 1
        if seen[reason] <= most:
            chosen.append(row)
    return chosen


def _pictures(file: pq.ParquetFile, rows: Any, chosen: list[int]) -> dict[int, bytes]:
    """Encoded pictures of the chosen ones of `rows`, reading only the row groups that they are in."""
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    ends = np.cumsum(sizes)
    found = {}
    for index in chosen:
        group = int(np.searchsorted(ends, rows[index], side="right"))
        column = file.read_row_group(group, columns=["image"]).column("image")
        found[index] = column[int(rows[index] - ends[group] + sizes[group])].as_py()
    return found
