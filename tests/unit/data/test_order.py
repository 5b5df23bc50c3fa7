"""The training order: complete, seeded, independent of the number of workers, well shuffled, cheap at scale."""

from __future__ import annotations

import numpy as np
import pytest

from unclip.data.order import RunOrder

FRAGMENT_ROWS = [64, 17, 100, 1, 64, 33, 64, 50, 64, 64]


def epoch_rows(order: RunOrder, epoch: int, fragment_rows: list[int]) -> np.ndarray:
    """Row numbers (over all fragments, in the manifest's order) in the order in which an epoch trains them."""
    starts = np.concatenate([[0], np.cumsum(fragment_rows)])
    trained = []
    for index in range(epoch * order.chunks_per_epoch, (epoch + 1) * order.chunks_per_epoch):
        chunk = order.chunk(index)
        read = np.concatenate([np.arange(starts[f] + a, starts[f] + b) for f, a, b in chunk.slices])
        trained.append(read[chunk.permutation])
    return np.concatenate(trained)


@pytest.mark.parametrize(("batch", "chunk_rows"), [(1, 1), (8, 64), (8, 128), (32, 2048), (521, 521)])
def test_every_row_once_in_an_epoch_less_the_remainder(batch: int, chunk_rows: int) -> None:
    order = RunOrder(FRAGMENT_ROWS, seed=3, global_batch_size=batch, chunk_rows=chunk_rows)
    rows = sum(FRAGMENT_ROWS)
    assert order.samples_per_epoch + order.remainder == rows
    assert order.samples_per_epoch % batch == 0
    for epoch in range(3):
        trained = epoch_rows(order, epoch, FRAGMENT_ROWS)
        assert len(trained) == order.samples_per_epoch
        assert len(set(trained.tolist())) == len(trained)
        assert set(trained.tolist()) <= set(range(rows))


def test_chunks_tile_the_positions_of_the_run() -> None:
    order = RunOrder(FRAGMENT_ROWS, seed=0, global_batch_size=8, chunk_rows=64)
    position = 0
    for index in range(3 * order.chunks_per_epoch):
        chunk = order.chunk(index)
        assert chunk.first_position == position
        assert chunk.epoch == position // order.samples_per_epoch
        assert chunk.rows % 8 == 0
        assert sum(stop - start for _, start, stop in chunk.slices) == chunk.rows
        assert all(0 <= start < stop <= FRAGMENT_ROWS[fragment] for fragment, start, stop in chunk.slices)
        assert {order.chunk_of(int(p)) for p in chunk.positions} == {index}
        position += chunk.rows


def test_order_is_a_function_of_seed_and_epoch() -> None:
    order = RunOrder(FRAGMENT_ROWS, seed=5, global_batch_size=8, chunk_rows=128)
    again = RunOrder(FRAGMENT_ROWS, seed=5, global_batch_size=8, chunk_rows=128)
    other = RunOrder(FRAGMENT_ROWS, seed=6, global_batch_size=8, chunk_rows=128)
    late, early = again.chunk(7), again.chunk(1)  # asked out of order: no state may matter
    assert order.chunk(1).slices == early.slices
    np.testing.assert_array_equal(order.chunk(7).permutation, late.permutation)
    first = epoch_rows(order, 0, FRAGMENT_ROWS)
    assert not np.array_equal(first, epoch_rows(order, 1, FRAGMENT_ROWS))
    assert not np.array_equal(first, epoch_rows(other, 0, FRAGMENT_ROWS))


def test_shuffle_quality_with_32_fragments_a_chunk() -> None:
    """Against a uniform permutation: rows travel as far, and neighbours in the file are as rarely trained together."""
    fragment_rows = [64] * 320
    rows = sum(fragment_rows)
    order = RunOrder(fragment_rows, seed=1, global_batch_size=64, chunk_rows=2048)
    place = np.argsort(epoch_rows(order, 0, fragment_rows))
    displacement = np.abs(place - np.arange(rows)).mean() / rows
    assert displacement == pytest.approx(1 / 3, abs=0.05)  # uniform: 1/3 of the length
    same_fragment_in_batch = []
    for batch in epoch_rows(order, 0, fragment_rows).reshape(-1, 64) // 64:
        _, counts = np.unique(batch, return_counts=True)
        same_fragment_in_batch.append((counts * (counts - 1)).sum() / (64 * 63))
    # Two rows of a batch share a fragment as often as a uniform shuffle of the chunk's 2048 rows would have it.
    assert np.mean(same_fragment_in_batch) == pytest.approx(63 / 2047, rel=0.1)


def test_a_hundred_thousand_fragments() -> None:
    order = RunOrder([100_000] * 100_000, seed=0, global_batch_size=4096, chunk_rows=4096 * 64)
    chunk = order.chunk(10 * order.chunks_per_epoch + 12345)
    assert chunk.epoch == 10
    assert chunk.rows == 4096 * 64
    assert len(chunk.slices) <= 4
    assert order.chunk_of(chunk.first_position) == chunk.index


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1, "global_batch_size": 8, "chunk_rows": 8}, "seed = -1"),
        ({"seed": 0, "global_batch_size": 8, "chunk_rows": 12}, "chunk_rows = 12"),
        ({"seed": 0, "global_batch_size": 1024, "chunk_rows": 1024}, "only 521 rows"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunOrder(FRAGMENT_ROWS, **settings)
