"""Duplicates against brute force: every pair, every decision, and the same ones however the rows are dealt out."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from benchmarks.data.duplicates import in_process, picture_hashes

from unclip.data.ingest import duplicates, near
from unclip.data.ingest.duplicates import HASHES, DuplicatePolicy, find_duplicates
from unclip.data.ingest.near import band_masks, near_pairs, pairs_in_band


def clustered(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Different hashes: some anywhere, some in a few tight clusters."""
    anywhere = rng.integers(0, 2**64, rows // 2, np.uint64)
    close = rng.integers(0, 2**64, 5, np.uint64)[rng.integers(0, 5, rows // 2)]
    for _ in range(4):
        close ^= np.uint64(1) << rng.integers(0, 64, len(close)).astype(np.uint64)
    return rng.permutation(np.unique(np.concatenate((anywhere, close))))


def cube(rng: np.random.Generator, bits: int) -> np.ndarray:
    """All hashes that differ from one in some of `bits` positions, and in no others."""
    positions = rng.permutation(64)[:bits].astype(np.uint64)
    choices = np.arange(2**bits, dtype=np.uint64)
    hashes = rng.integers(0, 2**64, 1, np.uint64) ^ np.zeros(2**bits, np.uint64)
    for index, position in enumerate(positions):
        hashes ^= ((choices >> np.uint64(index)) & np.uint64(1)) << position
    return rng.permutation(hashes)


def pairs_by_brute_force(hashes: np.ndarray, max_distance: int) -> set[tuple[int, int]]:
    close = np.bitwise_count(hashes[:, None] ^ hashes[None, :]) <= max_distance
    return set(zip(*(index.tolist() for index in np.nonzero(np.triu(close, 1))), strict=True))


def as_set(first: np.ndarray, second: np.ndarray) -> set[tuple[int, int]]:
    found = {(min(pair), max(pair)) for pair in zip(first.tolist(), second.tolist(), strict=True)}
    assert len(found) == len(first), "a pair is there twice"
    return found


@pytest.mark.parametrize("max_distance", range(9))
def test_all_near_pairs_are_found_once(max_distance: int) -> None:
    hashes = clustered(np.random.default_rng(max_distance), 1200)
    truth = pairs_by_brute_force(hashes, max_distance)
    assert (len(truth) > 20) == (max_distance > 1)
    assert as_set(*near_pairs(hashes, max_distance)) == truth


def test_buckets_that_are_too_large_are_searched_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "LARGEST_BUCKET", 256)
    rng = np.random.default_rng(0)
    hashes = np.unique(np.concatenate((cube(rng, 11), clustered(rng, 600))))
    assert as_set(*near_pairs(hashes, 3)) == pairs_by_brute_force(hashes, 3)


@pytest.mark.parametrize(("max_distance", "rows"), [(1, 10), (3, 1000), (3, 10**6), (3, 10**9), (5, 10**7), (8, 10**5)])
def test_bands_hold_every_pair_whose_bits_may_differ(max_distance: int, rows: int) -> None:
    masks = band_masks(max_distance, rows)
    rng = np.random.default_rng(rows)
    for _ in range(500):
        different = sum(1 << int(bit) for bit in rng.choice(64, max_distance, replace=False))
        assert any(not mask & different for mask in masks)


def test_bands_get_longer_with_the_rows() -> None:
    bits = [max(mask.bit_count() for mask in band_masks(3, 10**power)) for power in range(3, 13)]
    assert all(first <= second for first, second in pairwise(bits))
    assert 10**9 / 2 ** bits[6] < 100, "a bucket of a billion even hashes"


def test_a_pair_belongs_to_one_band() -> None:
    hashes = clustered(np.random.default_rng(5), 800)
    masks = band_masks(3, 10**9)
    found = [as_set(*pairs_in_band(hashes, masks, band, 3)) for band in range(len(masks))]
    assert sum(map(len, found)) == len(set.union(*found))
    assert set.union(*found) == pairs_by_brute_force(hashes, 3)


def find(table: pa.Table, policy: DuplicatePolicy, *, tables: int = 1, own_ids: bool = False) -> dict[int, tuple]:
    """place -> (reason, kept id, distance)."""
    cuts = np.linspace(0, table.num_rows, tables + 1).astype(int)
    inputs = [table.slice(start, stop - start) for start, stop in pairwise(cuts)]
    starts = np.linspace(0, table.num_rows, 3)[:-1].astype(np.int64)
    found = find_duplicates(inputs, policy, in_process, rows=table.num_rows, starts=starts, has_own_ids=own_ids)
    assert len(found) == len(starts)
    for part, start, stop in zip(found, starts, [*starts[1:], table.num_rows], strict=True):
        places = part.column("place").to_numpy()
        assert ((places >= start) & (places < stop)).all()
        assert (np.diff(places) > 0).all()
    rows = pa.concat_tables(found).to_pylist()
    return {row["place"]: (row["reason"], row["kept_id"], row["distance"]) for row in rows}


def brute_force(table: pa.Table, max_distance: int) -> dict[int, tuple]:
    """The definition, row by row."""
    rows = table.to_pylist()
    lowest: dict[bytes, int] = {}
    for row in rows:
        lowest[row["content_hash"]] = min(row["id"], lowest.get(row["content_hash"], row["id"]))
    kept: list[dict] = []
    left_out: list[dict] = []
    alone = [row for row in rows if lowest[row["content_hash"]] == row["id"]]
    for row in sorted(alone, key=lambda row: (-row["pixels"], row["id"])):
        near_kept = any((row["perceptual_hash"] ^ k["perceptual_hash"]).bit_count() <= max_distance for k in kept)
        (left_out if near_kept else kept).append(row)
    result = {}
    nearest: dict[bytes, tuple[int, int]] = {}
    for row in left_out:
        best = min(((row["perceptual_hash"] ^ k["perceptual_hash"]).bit_count(), k["id"]) for k in kept)
        nearest[row["content_hash"]] = best
        result[row["place"]] = ("near_duplicate", best[1], best[0])
    for row in rows:
        if lowest[row["content_hash"]] != row["id"]:
            distance, other = nearest.get(row["content_hash"], (0, lowest[row["content_hash"]]))
            result[row["place"]] = ("duplicate", other, distance)
    return result


@pytest.fixture(scope="module")
def pictures() -> pa.Table:
    """Copies, near copies, flat pictures, and chains of pictures each near the next; ids in no order."""
    table = picture_hashes(1500, seed=3)
    rng = np.random.default_rng(3)
    hashes = table.column("perceptual_hash").to_numpy().copy()
    content = table.column("content_hash").to_pylist()
    pixels = table.column("pixels").to_numpy().copy()
    single = [row for row, value in enumerate(content) if content.count(value) == 1][:200]
    for before, row in pairwise(single):
        if row % 10:
            hashes[row] = hashes[before] ^ np.uint64(0b11 << int(rng.integers(0, 62)))
    pixels[single] = rng.integers(1, 4, len(single)) * 4096
    columns = {
        "place": table.column("place"),
        "id": rng.permutation(1500) * 7 - 3000,
        "content_hash": table.column("content_hash"),
        "perceptual_hash": hashes,
        "pixels": pixels,
    }
    return pa.table(columns, schema=HASHES)


@pytest.mark.parametrize("max_distance", [0, 2, 3])
def test_decisions_are_those_of_the_definition(pictures: pa.Table, max_distance: int) -> None:
    truth = brute_force(pictures, max_distance)
    assert find(pictures, DuplicatePolicy(max_distance=max_distance)) == truth
    assert {reason for reason, _, _ in truth.values()} == {"duplicate", "near_duplicate"}


def test_decisions_do_not_depend_on_how_rows_are_dealt_out(pictures: pa.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = find(pictures, DuplicatePolicy())
    monkeypatch.setattr(duplicates, "ROWS_PER_PARTITION", 100)
    shuffled = pictures.take(np.random.default_rng(0).permutation(pictures.num_rows))
    assert find(shuffled, DuplicatePolicy(), tables=4) == truth


def test_no_kept_picture_is_near_another_and_chains_do_not_swallow() -> None:
    """Of a chain 0 - 1 - 2 - 3, each 3 bits from the next, every second one stays."""
    hashes = [0b0, 0b111, 0b111111, 0b111111111]
    columns = [range(4), range(4), [bytes([i]) * 32 for i in range(4)], hashes, [100] * 4]
    table = pa.table([pa.array(c, t) for c, t in zip(columns, HASHES.types, strict=True)], schema=HASHES)
    assert find(table, DuplicatePolicy()) == {1: ("near_duplicate", 0, 3), 3: ("near_duplicate", 2, 3)}
    larger = table.set_column(4, "pixels", pa.array([100, 400, 100, 100]))
    assert find(larger, DuplicatePolicy()) == {0: ("near_duplicate", 1, 3), 2: ("near_duplicate", 1, 3)}


def test_only_what_is_asked_for(pictures: pa.Table) -> None:
    assert find(pictures, DuplicatePolicy(find="none")) == {}
    truth = {place: row for place, row in brute_force(pictures, -1).items() if row[0] == "duplicate"}
    assert find(pictures, DuplicatePolicy(find="exact")) == truth


def test_ids_that_are_taken_twice(pictures: pa.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowest place keeps an id; the others are no duplicates of anything, nor is anything one of theirs."""
    monkeypatch.setattr(duplicates, "ROWS_PER_PARTITION", 400)
    ids = pictures.column("id").to_numpy().copy()
    ids[1000:1100] = ids[:100]
    table = pictures.set_column(1, "id", pa.array(ids))
    unique = pa.concat_tables([table.slice(0, 1000), table.slice(1100)])
    truth = brute_force(unique, 3) | {place: ("duplicate_id", int(ids[place]), 0) for place in range(1000, 1100)}
    assert find(table, DuplicatePolicy(), tables=3, own_ids=True) == truth


def test_no_rows() -> None:
    assert find(HASHES.empty_table(), DuplicatePolicy(), own_ids=True) == {}
