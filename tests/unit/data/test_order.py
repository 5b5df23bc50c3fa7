"""The training order: complete, seeded, independent of the number of workers, mixed as asked, well shuffled, cheap."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest

from unclip.data.order import RunOrder, batch_shares

FRAGMENT_ROWS = [64, 17, 100, 1, 64, 33, 64, 50, 64, 64]
ROWS = sum(FRAGMENT_ROWS)


def run_rows(order: RunOrder, fragment_rows: Sequence[Sequence[int]], chunks: int) -> tuple[np.ndarray, np.ndarray]:
    """Source and row number (over all its fragments, in the manifest's order) of each sample of the first chunks."""
    starts = [np.concatenate([[0], np.cumsum(rows)]) for rows in fragment_rows]
    sources, rows = [], []
    for chunk in map(order.chunk, range(chunks)):
        read = [[np.arange(starts[s][f] + a, starts[s][f] + b) for f, a, b in p] for s, p in enumerate(chunk.slices)]
        of_source = np.repeat(np.arange(len(read)), [sum(map(len, parts)) for parts in read])
        sources.append(of_source[chunk.permutation])
        rows.append(np.concatenate([part for parts in read for part in parts])[chunk.permutation])
    return np.concatenate(sources), np.concatenate(rows)


def alone(batch: int, chunk_rows: int, seed: int = 3) -> RunOrder:
    return RunOrder([FRAGMENT_ROWS], seed, global_batch_size=batch, chunk_rows=chunk_rows)


# --- one source -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "chunk_rows"), [(1, 1), (8, 64), (8, 128), (32, 2048), (521, 521)])
def test_every_row_once_in_an_epoch_less_the_remainder(batch: int, chunk_rows: int) -> None:
    order = alone(batch, chunk_rows)
    (source,) = order.sources
    size = source.samples_per_epoch
    assert (source.rows, source.remainder, size) == (ROWS, ROWS % batch, ROWS - ROWS % batch)
    _, rows = run_rows(order, [FRAGMENT_ROWS], -(-3 * size // chunk_rows))
    left_out = []
    for epoch in range(3):
        trained = set(rows[epoch * size : (epoch + 1) * size].tolist())
        assert len(trained) == size
        left_out.append(set(range(ROWS)) - trained)
        assert len(left_out[-1]) == source.remainder
    assert source.remainder < 2 or left_out[0] != left_out[1]


def test_chunks_tile_the_positions_of_the_run() -> None:
    order = alone(8, 64)
    for index in range(30):
        chunk = order.chunk(index)
        assert (chunk.index, chunk.first_position, chunk.rows) == (index, 64 * index, 64)
        (slices,) = chunk.slices
        assert sum(stop - start for _, start, stop in slices) == chunk.rows
        assert all(0 <= start < stop <= FRAGMENT_ROWS[fragment] for fragment, start, stop in slices)
        assert {order.chunk_of(int(p)) for p in chunk.positions} == {index}


def test_order_is_a_function_of_seed_and_epoch() -> None:
    order, again, other = alone(8, 128, seed=5), alone(8, 128, seed=5), alone(8, 128, seed=6)
    late, early = again.chunk(7), again.chunk(1)  # asked out of order: no state may matter
    assert order.chunk(1).slices == early.slices
    np.testing.assert_array_equal(order.chunk(7).permutation, late.permutation)
    size = order.sources[0].samples_per_epoch
    first = run_rows(order, [FRAGMENT_ROWS], 9)[1]
    assert not np.array_equal(first[:size], first[size : 2 * size])
    assert not np.array_equal(first[:size], run_rows(other, [FRAGMENT_ROWS], 9)[1][:size])


def test_shuffle_quality_with_32_fragments_a_chunk() -> None:
    """Against a uniform permutation: rows travel as far, and neighbours in the file are as rarely trained together."""
    fragment_rows = [64] * 320
    rows = sum(fragment_rows)
    order = RunOrder([fragment_rows], seed=1, global_batch_size=64, chunk_rows=2048)
    trained = run_rows(order, [fragment_rows], 10)[1]
    displacement = np.abs(np.argsort(trained) - np.arange(rows)).mean() / rows
    assert displacement == pytest.approx(1 / 3, abs=0.05)  # uniform: 1/3 of the length
    same_fragment_in_batch = []
    for batch in trained.reshape(-1, 64) // 64:
        _, counts = np.unique(batch, return_counts=True)
        same_fragment_in_batch.append((counts * (counts - 1)).sum() / (64 * 63))
    # Two rows of a batch share a fragment as often as a uniform shuffle of the chunk's 2048 rows would have it.
    assert np.mean(same_fragment_in_batch) == pytest.approx(63 / 2047, rel=0.1)


def test_a_hundred_thousand_fragments() -> None:
    order = RunOrder([[100_000] * 100_000], seed=0, global_batch_size=4096, chunk_rows=4096 * 64)
    chunk = order.chunk(order.chunk_of(10 * order.sources[0].samples_per_epoch) + 12345)
    assert chunk.rows == 4096 * 64
    assert len(chunk.slices[0]) <= 4


# --- a mix ------------------------------------------------------------------------------------------------------------

MIXES = [
    ([1.0, 1.0], 8),
    ([0.5, 0.5], 7),
    ([0.7, 0.3], 12),
    ([0.1, 0.2, 0.7], 10),
    ([1.0, 2.0, 3.0, 1.0], 7),
    ([1 / 3, 0.05, 0.61], 32),
]


@pytest.mark.parametrize(("weights", "batch"), MIXES)
def test_sources_have_given_their_share_after_every_batch(weights: list[float], batch: int) -> None:
    order = RunOrder([[500]] * len(weights), 0, weights=weights, global_batch_size=batch, chunk_rows=batch)
    shares = batch_shares(weights, batch)
    before = (0,) * len(weights)
    assert order.taken(0) == before
    for batches in [*range(1, 2000), 10**15]:
        taken = order.taken(batches)
        assert sum(taken) == batches * batch
        assert all(abs(n - batches * share) < 1 for n, share in zip(taken, shares, strict=True))
        assert all(now >= then for now, then in zip(taken, before, strict=True))
        before = taken


@pytest.mark.parametrize(("weights", "batch"), MIXES)
def test_a_mixed_run_is_what_its_closed_form_says(weights: list[float], batch: int) -> None:
    """Counts of each batch; each source's own samples, every row once in each of its epochs."""
    fragment_rows = [[5, 9, 3], [16, 30, 1, 8], [40] * 5, [11]][: len(weights)]
    order = RunOrder(fragment_rows, 1, weights=weights, global_batch_size=batch, chunk_rows=4 * batch)
    sources, rows = run_rows(order, fragment_rows, 30)
    for k, of_batch in enumerate(sources.reshape(-1, batch)):
        counts = np.bincount(of_batch, minlength=len(weights))
        np.testing.assert_array_equal(counts, np.subtract(order.taken(k + 1), order.taken(k)))
    for number, size in enumerate(map(sum, fragment_rows)):
        assert order.sources[number].remainder == 0
        of_source = rows[sources == number]
        for epoch in range(len(of_source) // size):
            assert sorted(of_source[epoch * size : (epoch + 1) * size]) == list(range(size))


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, 0.3], [0.9, 0.1]])
@pytest.mark.parametrize("workers", [2, 4, 8, 16])
def test_each_worker_gets_the_ratio_as_far_as_whole_numbers_allow(weights: list[float], workers: int) -> None:
    fragment_rows = [[500] * 4, [500] * 4]
    order = RunOrder(fragment_rows, 2, weights=weights, global_batch_size=48, chunk_rows=480)
    sources, _ = run_rows(order, fragment_rows, 4)
    parts = sources.reshape(-1, workers, 48 // workers)
    in_batch = (parts == 0).sum(axis=(1, 2))
    in_part = (parts == 0).sum(axis=2)
    assert np.abs(in_part - in_batch[:, None] / workers).max() <= 1


def test_sources_of_a_mix_are_shuffled_apart() -> None:
    fragment_rows = [[50] * 8, [50] * 8]
    order = RunOrder(fragment_rows, 2, weights=[1, 1], global_batch_size=16, chunk_rows=160)
    sources, rows = run_rows(order, fragment_rows, 5)
    assert (rows[sources == 0] == rows[sources == 1]).mean() < 0.05


def test_a_chunk_of_a_mix_needs_no_chunk_before_it() -> None:
    def order() -> RunOrder:
        return RunOrder([[50] * 8, [30] * 9], 2, weights=[2, 1], global_batch_size=16, chunk_rows=160)

    straight = order()
    chunks = [straight.chunk(index) for index in range(12)]
    fresh = order().chunk(11)
    assert fresh.slices == chunks[11].slices
    np.testing.assert_array_equal(fresh.permutation, chunks[11].permutation)


def test_weights_are_taken_as_they_are_written() -> None:
    assert batch_shares([0.7, 0.3], 10) == [7, 3]
    assert batch_shares([1, 2], 4) == [Fraction(4, 3), Fraction(8, 3)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1, "chunk_rows": 8}, "seed = -1"),
        ({"chunk_rows": 12}, "chunk_rows = 12"),
        ({"global_batch_size": 1024, "chunk_rows": 1024}, "source 0 has only 521 rows"),
        ({"fragment_rows": [[100], [3]], "weights": [1, 1], "chunk_rows": 8}, "source 1 has only 3 rows"),
        ({"fragment_rows": [[100], [100]], "weights": [1, 0.1], "chunk_rows": 8}, r"weights\[1\] = 0.1: less than"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunOrder(**{"fragment_rows": [FRAGMENT_ROWS], "seed": 0, "global_batch_size": 8} | settings)  # type: ignore[arg-type]
