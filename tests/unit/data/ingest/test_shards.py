"""Shards: the rows that they should hold, within their bounds, in the same bytes every time."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unclip.config.base import ConfigError
from unclip.data.ingest.shards import (
    Piece,
    ShardPolicy,
    cut,
    packed,
    plan_shards,
    records_sha256,
    row_bytes,
    write_shard,
    write_tables,
)

SMALL = ShardPolicy(shard_bytes=20_000, row_group_bytes=4_000, row_group_rows=16)


def records(rows: int, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    columns = {
        "id": pa.array(range(rows), pa.int64()),
        "image": pa.array([rng.bytes(int(rng.integers(10, 900))) for _ in range(rows)], pa.large_binary()),
        "caption": [f"picture {row}" for row in range(rows)],
        "source": ["here"] * rows,
    }
    return pa.table(columns)


def staged(folder: Path, tables: list[pa.Table]) -> list[Piece]:
    """Tables as staged parts; a piece for each row group, with nothing left out yet."""
    pieces = []
    for part, table in enumerate(tables):
        cuts = list(cut(table, SMALL))
        write_tables(f"{folder}/{part}.parquet", table.schema, cuts)
        first = part << 28
        for row_group, piece in enumerate(cuts):
            size = int(row_bytes(piece).sum())
            pieces.append(Piece(part, row_group, first, piece.num_rows, piece.num_rows, size))
            first += piece.num_rows
    return pieces


def test_pieces_are_the_table_again_and_small() -> None:
    table = records(200)
    pieces = list(cut(table, SMALL))
    assert pa.concat_tables(pieces).equals(table)
    assert max(piece.num_rows for piece in pieces) == 4
    assert all(row_bytes(piece).sum() <= 1000 * 1.05 or piece.num_rows == 1 for piece in pieces)


def test_packed_keeps_order_and_limits() -> None:
    weights = [3, 3, 3, 9, 1, 1, 12, 2]
    assert list(packed(weights, lambda w: (w,), (9,))) == [(3, 3, 3), (9,), (1, 1), (12,), (2,)]
    assert list(packed(weights, lambda w: (w, 1), (100, 3))) == [(3, 3, 3), (9, 1, 1), (12, 2)]
    assert list(packed([], lambda w: (w,), (9,))) == []


def test_shards_hold_all_rows_within_their_bounds() -> None:
    rng = np.random.default_rng(0)
    pieces = [Piece(0, i, i * 4, 4, int(rng.integers(0, 5)), int(rng.integers(1, 1000))) for i in range(500)]
    shards = plan_shards(pieces, SMALL)
    assert [piece for shard in shards for group in shard.row_groups for piece in group] == [p for p in pieces if p.rows]
    for shard in shards:
        sizes = [sum(piece.bytes for piece in group) for group in shard.row_groups]
        assert sum(sizes) <= SMALL.shard_bytes
        assert max(sizes) <= SMALL.row_group_bytes
        assert max(sum(piece.rows for piece in group) for group in shard.row_groups) <= SMALL.row_group_rows
        assert shard.rows > 0
    assert [shard.file for shard in shards[:2]] == ["data-00000.parquet", "data-00001.parquet"]


def test_names_sort_in_their_order() -> None:
    policy = ShardPolicy(shard_bytes=1, row_group_bytes=1, row_group_rows=1)
    names = [shard.file for shard in plan_shards((Piece(0, i, i, 1, 1, 1) for i in range(100_001)), policy)]
    assert names == sorted(names)


def test_a_shard_is_the_staged_rows_but_those_left_out(tmp_path: Path) -> None:
    tables = [records(30, seed=1), records(50, seed=2)]
    pieces = staged(tmp_path, tables)
    removed = np.array([0, 1, 2, 3, 29, (1 << 28) + 7, (1 << 28) + 49])
    shards = plan_shards(pieces, SMALL)
    facts = [
        write_shard(str(tmp_path / "out"), s, tables[0].schema, removed, lambda part: f"{tmp_path}/{part}.parquet")
        for s in shards
    ]
    found = pa.concat_tables([pq.read_table(tmp_path / "out" / shard.file) for shard in shards])
    stay = [row for row in range(30) if row not in (0, 1, 2, 3, 29)]
    stay_too = [row for row in range(50) if row not in (7, 49)]
    assert found.equals(pa.concat_tables([tables[0].take(stay), tables[1].take(stay_too)]))
    for entry in facts:
        path = tmp_path / "out" / entry["file"]
        footer = pq.read_metadata(path)
        assert entry["bytes"] == path.stat().st_size
        assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert entry["row_groups"] == [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
        assert entry["rows"] == sum(entry["row_groups"]) == footer.num_rows
        assert footer.row_group(0).column(1).compression == "UNCOMPRESSED"
    assert len(records_sha256(facts)) == 64
    assert records_sha256(facts) != records_sha256(facts[::-1])


def test_equal_tables_give_equal_bytes_however_they_came_about(tmp_path: Path) -> None:
    table = records(3000)
    with_metadata = table.replace_schema_metadata({"made": "elsewhere"})
    chunked = pa.concat_tables([table.slice(0, 700), table.slice(700, 1), table.slice(701)])
    gathered = table.take(np.arange(3000))
    hashes = {
        write_tables(f"{tmp_path}/{number}.parquet", made.schema, [made])["sha256"]
        for number, made in enumerate((table, with_metadata, chunked, gathered))
    }
    assert len(hashes) == 1


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def tables() -> pa.Table:
        yield records(3)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        write_tables(f"{tmp_path}/a.parquet", records(1).schema, tables())
    assert list(tmp_path.iterdir()) == []


def test_row_groups_that_do_not_fit_a_shard_are_refused() -> None:
    with pytest.raises(ConfigError, match="row_group_bytes = 100 is more than shard_bytes = 10"):
        ShardPolicy.from_dict({"shard_bytes": 10, "row_group_bytes": 100})
    with pytest.raises(ConfigError, match="row_group_bytes"):
        ShardPolicy.from_dict({"row_group_bytes": 2**30})
