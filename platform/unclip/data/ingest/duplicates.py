"""Which records are the same picture as another one, found from hashes alone and without any process seeing all rows.

Rows travel as Arrow tables between steps that each see a share of them (`Shuffle`: in one process, or as Ray tasks):
by perceptual hash, to find pictures whose hashes are equal; by each band of `near.py`, to find pairs of hashes that
differ a little; the pairs alone in one place, to decide; and back to where the rows came from.

*Exact*: the same `content_hash` (decoded pixels). The lowest id stands for them.
*Near*: perceptual hashes at most `max_distance` bits apart, by stars and not by chains. In the order of most pixels, then
lowest id, a picture is kept unless it is near one that is kept already. So no two kept pictures are near each other, and
each one left out is near a kept one: the nearest is named, of several that of the lowest id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from unclip.config.base import Config
from unclip.data.ingest.near import Rows, band_masks, pairs_in_band

ROWS_PER_PARTITION = 2**21
"""Rows that a step sees at once, about 350 bytes each while it works; more only where very many have one hash."""

HASHES = pa.schema(
    [
        ("place", pa.int64()),  # unique; rises in the order of the sources' rows
        ("id", pa.int64()),
        ("content_hash", pa.binary(32)),
        ("perceptual_hash", pa.uint64()),
        ("pixels", pa.int64()),
    ]
)
REMOVED = pa.schema([("place", pa.int64()), ("reason", pa.string()), ("kept_id", pa.int64()), ("distance", pa.int8())])

_REASONS = ("", "duplicate_id", "duplicate", "near_duplicate")
_STANDS, _SAME_ID, _EXACT, _NEAR = range(len(_REASONS))
_LINKS = pa.schema([*HASHES, ("kept_place", pa.int64()), ("kept_id", pa.int64()), ("reason", pa.int8())])
"""`reason`: index in _REASONS; a row that stands for itself is its own `kept_place`."""
_PAIRS = pa.schema([(name, pa.int64()) for name in ("low", "low_id", "high", "high_id")] + [("distance", pa.int8())])
"""Places and ids of two near rows: the one that ranks lower, and the one that outranks it."""
_DECIDED = pa.schema([("place", pa.int64()), ("kept_id", pa.int64()), ("distance", pa.int8())])

Handle = Any
"""A table, or whatever stands for one where the `Shuffle` works: only it looks inside."""


class DuplicatePolicy(Config):
    """Which pictures count as the same."""

    find: Literal["none", "exact", "near"] = "near"
    """exact: the same pixels, however they are stored; near: also those whose perceptual hashes are close."""
    max_distance: int = Field(default=3, ge=0, le=8)
    """Bits of 64 in which perceptual hashes of near duplicates may differ; more is slower, and finds different pictures too."""


class Shuffle(Protocol):
    """Runs `split(input, *shared)` on each input, and `merge` on what all of them put into the same partition."""

    def __call__(
        self,
        inputs: Sequence[Handle],
        split: Callable[..., list[pa.Table]],
        merge: Callable[[pa.Table], pa.Table],
        partitions: int,
        *shared: Handle,
    ) -> list[Handle]: ...


def find_duplicates(
    tables: Sequence[Handle],
    policy: DuplicatePolicy,
    shuffle: Shuffle,
    *,
    rows: int,
    starts: npt.NDArray[np.int64],
    has_own_ids: bool = False,
) -> list[Handle]:
    """The rows to leave out, as REMOVED tables sorted by place: number i has the places from `starts[i]` to `starts[i+1]`.

    Args:
        tables: HASHES tables, all rows in any order. Rows of equal content_hash must have equal perceptual_hash and pixels.
        rows: number of rows in all.
        has_own_ids: ids may be taken twice: then the lowest place keeps it and the others have reason `duplicate_id`.

    `reason` is `duplicate` or `near_duplicate`, `kept_id` is a row that is kept, and `distance` the bits between their
    perceptual hashes. Depends neither on the order of rows nor on how they are divided into tables.
    """
    partitions = max(1, -(-rows // ROWS_PER_PARTITION))
    links = list(tables)
    if has_own_ids:
        links = shuffle(links, partial(_split_by_id, partitions=partitions), _link_ids, partitions)
    if policy.find != "none":
        near = policy.find == "near"
        split = partial(_split_by_picture, near=near, partitions=partitions)
        links = shuffle(links, split, partial(_link_pictures, near=near), partitions)
    pairs: list[Handle] = []
    if policy.find == "near" and policy.max_distance:
        masks = band_masks(policy.max_distance, rows)
        for band, mask in enumerate(masks):
            split = partial(_split_by_band, mask=mask, partitions=partitions)
            merge = partial(_near_in_band, masks=masks, band=band, max_distance=policy.max_distance)
            pairs += shuffle(links, split, merge, partitions)
    decided = shuffle(pairs, _whole, decide, 1) if pairs else []
    return shuffle(links, partial(_split_by_start, starts=starts), _by_place, len(starts), *decided)


def decide(pairs: pa.Table) -> pa.Table:
    """Which rows of near pairs are left out, and for which kept row: the greedy choice in the order of rank, in rounds.

    In each round the rows that no undecided row outranks are kept, and their pairs' other rows are left out; the number of
    rounds is the length of the longest chain of ever lower ranks, a few dozen at most in practice.
    """
    places, index = np.unique(np.concatenate((_column(pairs, "low"), _column(pairs, "high"))), return_inverse=True)
    low, high = index[: pairs.num_rows], index[pairs.num_rows :]
    is_out = np.zeros(len(places), bool)
    is_open = np.ones(len(places), bool)
    live = np.arange(len(low))
    while len(live):
        outranked = np.zeros(len(places), bool)
        outranked[low[live]] = True
        is_out[low[live][(is_open & ~outranked)[high[live]]]] = True
        is_open &= outranked & ~is_out
        live = live[is_open[low[live]] & ~is_out[high[live]]]
    return _nearest_kept(pairs, is_out[low], is_out[high])


def _nearest_kept(pairs: pa.Table, low_out: npt.NDArray[np.bool_], high_out: npt.NDArray[np.bool_]) -> pa.Table:
    """For each row that is left out its nearest kept one, whichever outranks the other; of several the lowest id."""
    sides = [
        (low_out & ~high_out, ["low", "high_id", "distance"]),
        (high_out & ~low_out, ["high", "low_id", "distance"]),
    ]
    chosen = [pairs.filter(pa.array(rows)).select(columns).rename_columns(_DECIDED.names) for rows, columns in sides]
    found = pa.concat_tables(chosen).sort_by([(name, "ascending") for name in ("place", "distance", "kept_id")])
    return found.take(np.unique(_column(found, "place"), return_index=True)[1])


def _split_by_id(table: pa.Table, partitions: int) -> list[pa.Table]:
    return _split(table, _column(table, "id").astype(np.uint64), partitions)


def _whole(table: pa.Table) -> list[pa.Table]:
    return [table]


def _linked(table: pa.Table) -> pa.Table:
    """Each row linked to itself, where that is not done yet."""
    if "kept_place" in table.column_names:
        return table
    links = [table.column("place"), table.column("id"), np.zeros(table.num_rows, np.int8)]
    return pa.table([*table.columns, *links], schema=_LINKS)


def _link_ids(table: pa.Table) -> pa.Table:
    """Links each row to the first of the same id."""
    place = _column(table, "place")
    kept = _first_equal(table.column("id"), np.argsort(place))
    reason = np.where(place[kept] == place, _STANDS, _SAME_ID).astype(np.int8)
    return pa.table([*table.columns, place[kept], table.column("id"), reason], schema=_LINKS)


def _split_by_picture(table: pa.Table, near: bool, partitions: int) -> list[pa.Table]:
    table = _linked(table)
    if near:
        return _split(table, _column(table, "perceptual_hash"), partitions)
    hashes = table.column("content_hash").combine_chunks()
    words = np.frombuffer(hashes.buffers()[1] or b"", np.uint64).reshape(-1, 4)[
        hashes.offset : hashes.offset + len(hashes)
    ]
    return _split(table, words[:, 0], partitions)


def _link_pictures(table: pa.Table, near: bool) -> pa.Table:
    """Links rows of equal content to the one of the lowest id, and of those, where asked, rows of equal perceptual hash
    to the one of most pixels."""
    is_done = pc.equal(table.column("reason"), _SAME_ID)
    done, table = table.filter(is_done), table.filter(pc.invert(is_done))
    ids = _column(table, "id")
    exact = _first_equal(table.column("content_hash"), np.argsort(ids))
    rank = np.lexsort((ids, -_column(table, "pixels")))
    kept = _first_equal(table.column("perceptual_hash"), rank) if near else exact
    own = np.arange(len(ids))
    reason = np.where(exact != own, _EXACT, np.where(kept != own, _NEAR, _STANDS)).astype(np.int8)
    links = [_column(table, "place")[kept], ids[kept], reason]
    return pa.concat_tables([done, pa.table([*table.columns[: len(HASHES)], *links], schema=_LINKS)])


def _split_by_band(table: pa.Table, mask: int, partitions: int) -> list[pa.Table]:
    heads = table.filter(pc.equal(table.column("reason"), _STANDS)).select(["place", "id", "perceptual_hash", "pixels"])
    return _split(heads, _column(heads, "perceptual_hash") & np.uint64(mask), partitions)


def _near_in_band(table: pa.Table, masks: Sequence[int], band: int, max_distance: int) -> pa.Table:
    """The pairs of one band: the row that ranks lower, then the one that outranks it."""
    hashes, ids = _column(table, "perceptual_hash"), _column(table, "id")
    first, second = pairs_in_band(hashes, masks, band, max_distance)
    pixels = _column(table, "pixels")
    swap = (pixels[first] < pixels[second]) | ((pixels[first] == pixels[second]) & (ids[first] > ids[second]))
    high, low = np.where(swap, second, first), np.where(swap, first, second)
    place = _column(table, "place")
    distance = np.bitwise_count(hashes[low] ^ hashes[high]).astype(np.int8)
    return pa.table([place[low], ids[low], place[high], ids[high], distance], schema=_PAIRS)


def _split_by_start(table: pa.Table, *decided: pa.Table, starts: npt.NDArray[np.int64]) -> list[pa.Table]:
    """The rows to leave out. A row linked to one that is itself left out goes to the row that is kept for that one."""
    table, out = _linked(table), decided[0] if decided else _DECIDED.empty_table()
    place, kept_place = _column(table, "place"), _column(table, "kept_place")
    reason = _column(table, "reason").copy()
    position = np.searchsorted(_column(out, "place"), kept_place)
    found = np.flatnonzero((position < out.num_rows) & (reason != _SAME_ID))
    found = found[_column(out, "place")[position[found]] == kept_place[found]]
    kept_id, distance = _column(table, "kept_id").copy(), np.zeros(len(place), np.int8)
    kept_id[found] = _column(out, "kept_id")[position[found]]
    distance[found] = _column(out, "distance")[position[found]]
    reason[found[reason[found] == _STANDS]] = _NEAR
    removed = np.flatnonzero(reason)
    names = pa.DictionaryArray.from_arrays(pa.array(reason[removed]), pa.array(_REASONS)).cast(pa.string())
    columns = [place[removed], names, kept_id[removed], distance[removed]]
    destination = np.searchsorted(starts, place[removed], side="right") - 1
    return _divide(pa.table(columns, schema=REMOVED), destination, len(starts))


def _by_place(table: pa.Table) -> pa.Table:
    return table.sort_by("place")


def _first_equal(keys: pa.ChunkedArray, order: Rows) -> Rows:
    """For each row the row with the same key that comes first in `order`."""
    codes = keys.combine_chunks().take(pa.array(order)).dictionary_encode().indices.to_numpy()  # in order of appearance
    first = np.flatnonzero(np.diff(np.maximum.accumulate(codes), prepend=-1))
    result = np.empty(len(order), np.int64)
    result[order] = order[first[codes]]
    return result


def _split(table: pa.Table, keys: npt.NDArray[np.uint64], partitions: int) -> list[pa.Table]:
    """Rows of equal keys into the same of `partitions`, evenly: by a hash of the key."""
    if partitions == 1:
        return [table]
    mixed = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return _divide(table, ((mixed ^ (mixed >> np.uint64(31))) % np.uint64(partitions)).astype(np.int64), partitions)


def _divide(table: pa.Table, destination: Rows, partitions: int) -> list[pa.Table]:
    order = np.argsort(destination, kind="stable")
    ends = np.cumsum(np.bincount(destination, minlength=partitions))
    table = table.take(order)
    return [table.slice(start, end - start) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _column(table: pa.Table, name: str) -> npt.NDArray[Any]:
    return table.column(name).to_numpy()
