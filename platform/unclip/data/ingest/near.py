"""All pairs of 64-bit hashes that differ in a few bits, in time that grows with the rows and the pairs found.

The bits are dealt out to more blocks than may differ, so two near hashes agree on some blocks whole: those that agree on
a chosen set of blocks (a *band*) are in one bucket, and only rows of a bucket are compared. With d bits that may differ
and d + k blocks every choice of k blocks is a band; more blocks make more bands with smaller buckets. A bucket that is
large all the same (near-uniform pictures have near-equal hashes) is searched in the same way over the bits that vary in
it. So nothing is left out, however the hashes are distributed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import comb

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]

ALL_BITS = 2**64 - 1
LARGEST_BUCKET = 1024
"""Rows of a bucket that are compared each with each."""
_SORT_COST = 12.0
"""What sorting a row into a band costs, in comparisons."""


def band_masks(max_distance: int, rows: int, varying: int = ALL_BITS) -> tuple[int, ...]:
    """The bits of each band for `rows` different hashes whose bits differ only where `varying` has ones.

    Two hashes that differ in at most `max_distance` bits agree on all bits of at least one of the masks. Which number of
    blocks is cheapest depends on the rows: for 3 bits, 4 bands of 16 bits up to 10^6 rows and 10 of 25 for 10^9.
    """
    bits = [bit for bit in range(64) if varying >> bit & 1]
    chosen = min(range(len(bits) - max_distance + 1), key=lambda k: _cost(max_distance, k, rows, len(bits)), default=0)
    blocks = max_distance + chosen
    # Every blocks-th bit: neighbouring bits of a picture's hash are alike, and a block of them would say little.
    values = [sum(1 << bit for bit in bits[block::blocks]) for block in range(blocks)]
    return tuple(sum(choice) for choice in combinations(values, chosen))


def near_pairs(hashes: Hashes, max_distance: int) -> tuple[Rows, Rows]:
    """Indices (i, j) of all pairs of `hashes` (n,), each pair once, that differ in at most `max_distance` bits (0 to 8).

    The hashes must be different from each other: equal ones would be pairs without end.
    """
    if len(hashes) < 2:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    varying = int(np.bitwise_or.reduce(hashes) & ~np.bitwise_and.reduce(hashes))
    masks = band_masks(max_distance, len(hashes), varying)
    return _joined([pairs_in_band(hashes, masks, band, max_distance) for band in range(len(masks))])


def pairs_in_band(hashes: Hashes, masks: Sequence[int], band: int, max_distance: int) -> tuple[Rows, Rows]:
    """The pairs of `near_pairs` that agree on `masks[band]` and on none of the masks before it."""
    mask = np.uint64(masks[band])
    order = np.argsort(hashes & mask)
    ordered = hashes[order]
    keys = ordered & mask
    starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))[: len(hashes)]
    sizes = np.diff(np.append(starts, len(hashes)))
    found = [_pairs_of_small(ordered, starts, sizes, max_distance)]
    for start, size in zip(starts[sizes > LARGEST_BUCKET], sizes[sizes > LARGEST_BUCKET], strict=True):
        first, second = near_pairs(ordered[start : start + size], max_distance)
        found.append((first + start, second + start))
    first, second = _joined(found)
    different = ordered[first] ^ ordered[second]
    is_new = np.ones(len(first), bool)
    for earlier in masks[:band]:
        is_new &= (different & np.uint64(earlier)) != 0
    return order[first[is_new]], order[second[is_new]]


def _pairs_of_small(ordered: Hashes, starts: Rows, sizes: Rows, max_distance: int) -> tuple[Rows, Rows]:
    """Near pairs inside the buckets of `ordered` that are not too large: all of them side by side, by growing shift."""
    ends = np.repeat(starts + sizes, sizes)
    left = np.flatnonzero(np.repeat(sizes <= LARGEST_BUCKET, sizes))
    found: list[tuple[Rows, Rows]] = []
    shift = 0
    while len(left):
        shift += 1
        left = left[left + shift < ends[left]]
        close = left[np.bitwise_count(ordered[left] ^ ordered[left + shift]) <= max_distance]
        found.append((close, close + shift))
    return _joined(found)


def _cost(max_distance: int, chosen: int, rows: int, bits: int) -> float:
    """Comparisons a row that bands of `chosen` blocks take, were the hashes evenly distributed."""
    if chosen == 0:
        return rows / 2 if rows <= LARGEST_BUCKET else float("inf")
    key_bits = bits * chosen / (max_distance + chosen)
    return comb(max_distance + chosen, chosen) * (_SORT_COST + rows / 2**key_bits / 2)


def _joined(pairs: list[tuple[Rows, Rows]]) -> tuple[Rows, Rows]:
    if not pairs:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    first, second = zip(*pairs, strict=True)
    return np.concatenate(first), np.concatenate(second)
