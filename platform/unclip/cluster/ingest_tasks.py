"""What the tasks of an ingest do, each on its own share: a part of a source, a block of parts, or a shard."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unclip.data.ingest.duplicates import HASHES, REMOVED
from unclip.data.ingest.quarantine import write_quarantine
from unclip.data.ingest.records import RecordPolicy
from unclip.data.ingest.shards import Shard, ShardPolicy, packed, write_shard, write_tables
from unclip.data.ingest.staging import WORK_FOLDER, PartStager, pieces_of, read_hashes, staged_file
from unclip.data.sources import SourceConfig
from unclip.data.sources.base import Part
from unclip.utils import storage

ROWS_PER_BLOCK = 2**20
"""Records of a block, unless one part has more."""

Facts = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What every task needs to know.

    Args:
        out: folder of the records, absolute.
        schema: their columns.
    """

    out: str
    sources: tuple[SourceConfig, ...]
    records: RecordPolicy
    shards: ShardPolicy
    schema: pa.Schema

    def folder(self, *names: str) -> str:
        """Where work in progress lies."""
        return storage.join(self.out, WORK_FOLDER, *names)


@dataclass(frozen=True)
class NumberedPart:
    """A part of source number `source`, numbered among those of all sources; its rows' ids begin with `first_id`."""

    source: int
    part: Part
    number: int
    first_id: int

    @property
    def name(self) -> str:
        return f"{self.number:08d}"


@dataclass(frozen=True)
class Block:
    """Consecutive parts whose hashes are read together and whose other rows share quarantine tables.

    Args:
        parts: number and name of each.
        filled: numbers of those that have records.
    """

    number: int
    parts: tuple[tuple[int, str], ...]
    filled: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.number:05d}"


def blocks_of(parts: Sequence[NumberedPart], judged: Sequence[Facts]) -> list[Block]:
    """All parts in blocks of about ROWS_PER_BLOCK records; `judged` is what `judge_part` said of each."""
    rows = zip(parts, (facts["kept"] for facts in judged), strict=True)
    groups = packed(rows, lambda item: (item[1],), (ROWS_PER_BLOCK,))
    return [
        Block(
            number,
            tuple((part.number, part.part.name) for part, _ in group),
            tuple(part.number for part, kept in group if kept),
        )
        for number, group in enumerate(groups)
    ]


def blocks_in(shard: Shard, blocks: Sequence[Block]) -> list[str]:
    """Names of the blocks that a shard's records come from."""
    firsts = [block.parts[0][0] for block in blocks]
    numbers = {bisect(firsts, piece.part) - 1 for group in shard.row_groups for piece in group}
    return [blocks[number].name for number in sorted(numbers)]


def judge_part(work: Work, part: NumberedPart) -> Facts:
    """Stages a part: its `rows`, those `kept`, and those `rejected` by reason."""
    source = work.sources[part.source]
    stager = PartStager(
        work.out,
        number=part.number,
        first_id=part.first_id,
        schema=work.schema,
        policy=work.records,
        shards=work.shards,
    )
    return stager.run(source.build(), part.part, name=source.uri, id_column=source.id_column)


def hashes_of_block(work: Work, block: Block) -> pa.Table:
    return read_hashes(work.out, block.filled).select(HASHES.names)


def close_block(work: Work, block: Block, removed: pa.Table) -> Facts:
    """Writes down which rows are left out; the rows `removed` by reason, and the `pieces` without them."""
    write_tables(_removed_file(work, block.name), REMOVED, [removed])
    pieces = pieces_of(read_hashes(work.out, block.filled), removed.column("place").to_numpy())
    counts = removed.column("reason").value_counts().to_pylist()
    return {"removed": {count["values"]: count["counts"] for count in counts}, "pieces": pieces}


def make_shard(work: Work, shard: Shard, blocks: Sequence[str]) -> Facts:
    """Writes a shard; its entry of the manifest."""
    removed = np.concatenate([_removed(work, name).column("place").to_numpy() for name in blocks])
    return write_shard(work.out, shard, work.schema, removed, partial(staged_file, work.out, "kept"))


def quarantine_block(work: Work, block: Block) -> Facts:
    """Writes the quarantine of a block; the entries of the manifest as `files`."""
    removed = _removed(work, block.name)
    return {"files": write_quarantine(work.out, block.number, block.parts, removed, work.records)}


def _removed_file(work: Work, block: str) -> str:
    return work.folder("removed", f"{block}.parquet")


def _removed(work: Work, block: str) -> pa.Table:
    with storage.local_file(_removed_file(work, block)) as path:
        return pq.read_table(path)
