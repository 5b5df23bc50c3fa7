"""The benchmarks of the stream measure what they say. No time is judged here."""

from __future__ import annotations

import numpy as np
import pytest
from benchmarks.data import shuffling, stream_scale

ROWS, BATCH, FRAGMENT = 10_000, 50, 100


def test_quality_of_orders_whose_numbers_are_known() -> None:
    def numbers(trained: np.ndarray) -> dict[str, float]:
        return shuffling.quality(trained, batch=BATCH, fragment_rows=FRAGMENT)

    unshuffled = numbers(np.arange(ROWS))
    assert unshuffled["displacement"] == 0
    assert unshuffled["neighbour_correlation"] == pytest.approx(1)
    assert unshuffled["adjacent_in_batch"] == pytest.approx(1 - 1 / BATCH, abs=1e-3)
    assert unshuffled["fragment_in_batch"] == 1
    ideal = numbers(shuffling.uniform(ROWS))
    assert ideal["displacement"] == pytest.approx(1 / 3, abs=0.01)
    assert ideal["neighbour_correlation"] == pytest.approx(0, abs=0.03)
    assert ideal["batch_coverage"] == pytest.approx(1, abs=0.03)
    assert ideal["adjacent_in_batch"] == pytest.approx(BATCH / ROWS, abs=0.002)
    assert ideal["fragment_in_batch"] == pytest.approx((FRAGMENT - 1) / (ROWS - 1), rel=0.1)
    striped = numbers(np.arange(ROWS).reshape(FRAGMENT, -1).T.reshape(-1))  # one row of each fragment after the other
    assert striped["fragment_in_batch"] == 0


@pytest.mark.parametrize(
    "trained",
    [
        shuffling.ours(ROWS, FRAGMENT, batch=BATCH, chunk_rows=500),
        shuffling.buffered(ROWS, 10 * FRAGMENT, 300),
        shuffling.uniform(ROWS),
    ],
    ids=["ours", "buffered", "uniform"],
)
def test_orders_are_permutations(trained: np.ndarray) -> None:
    np.testing.assert_array_equal(np.sort(trained), np.arange(ROWS))


def test_the_start_is_measured_on_shards_that_can_be_read() -> None:
    with stream_scale.records(3) as folder:
        found = stream_scale.startup_of(folder)
    assert found["rows"] == 3 * stream_scale.SHARD_ROWS
    assert all(found[name] > 0 for name in ("scan_s", "restore_s", "read_first_chunk_s", "pickled_bytes"))
    times = [dict.fromkeys(("rows", "scan_s", "order_s", "first_chunk_s", "restore_s"), 2.0)]
    assert stream_scale.extrapolated(times, rows=6)["scan_s"] == 6
