"""How well an order of training mixes a data set, as numbers: ours, a uniform permutation, and shards with a shuffle buffer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from unclip.data.order import RunOrder

IntArray = npt.NDArray[np.int64]


def quality(trained: IntArray, *, batch: int, fragment_rows: int) -> dict[str, float]:
    """Numbers of an epoch, a whole number of batches, whose i-th sample is record `trained[i]` of the input.

    - displacement: mean way of a record between input and training, as a share of the rows; uniform: 1/3.
    - neighbour_correlation: of the input places of samples trained one after the other; uniform: 0.
    - batch_coverage: spread (standard deviation) of input places inside a batch, over that of the whole; uniform: 1.
    - adjacent_in_batch: share of neighbours in the input that are trained in the same batch.
    - fragment_in_batch: chance that two samples of a batch are of one fragment of the input.
    """
    rows = len(trained)
    place = np.empty(rows, dtype=np.int64)
    place[trained] = np.arange(rows)
    whole = trained.reshape(-1, batch)
    fragments = np.sort(whole // fragment_rows, axis=1)
    return {
        "displacement": float(np.abs(place - np.arange(rows)).mean() / rows),
        "neighbour_correlation": float(np.corrcoef(trained[:-1], trained[1:])[0, 1]),
        "batch_coverage": float(whole.std(axis=1).mean() / trained.std()),
        "adjacent_in_batch": float((place[:-1] // batch == place[1:] // batch).mean()),
        "fragment_in_batch": float(_same_pairs(fragments).mean() / (batch * (batch - 1) / 2)),
    }


def _same_pairs(values: IntArray) -> IntArray:
    """(batches,) pairs of equal values in each row of (batches, n) sorted values."""
    pairs = np.zeros(len(values), dtype=np.int64)
    run = np.zeros(len(values), dtype=np.int64)
    for column in range(1, values.shape[1]):
        run = np.where(values[:, column] == values[:, column - 1], run + 1, 0)
        pairs += run
    return pairs


def ours(rows: int, fragment_rows: int, *, batch: int, chunk_rows: int) -> IntArray:
    """An epoch of `RunOrder`."""
    order = RunOrder(
        [[fragment_rows] * (rows // fragment_rows)], seed=0, global_batch_size=batch, chunk_rows=chunk_rows
    )
    trained = []
    for chunk in map(order.chunk, range(order.chunk_of(order.sources[0].samples_per_epoch - 1) + 1)):
        read = np.concatenate([np.arange(f * fragment_rows + a, f * fragment_rows + b) for f, a, b in chunk.slices[0]])
        trained.append(read[chunk.permutation])
    return np.concatenate(trained)[: order.sources[0].samples_per_epoch]


def uniform(rows: int) -> IntArray:
    return np.random.default_rng(0).permutation(rows)


def buffered(rows: int, shard_rows: int, buffer_rows: int) -> IntArray:
    """Shards in random order through a buffer out of which a random sample is taken for each that comes in.

    What WebDataset's `shardshuffle` and `shuffle(buffer_rows)` do in one process.
    """
    return np.fromiter(_through_buffer(rows, shard_rows, buffer_rows), dtype=np.int64, count=rows)


def _through_buffer(rows: int, shard_rows: int, buffer_rows: int) -> Iterator[int]:
    draws = np.random.default_rng(0)
    incoming = (draws.permutation(rows // shard_rows)[:, None] * shard_rows + np.arange(shard_rows)).reshape(-1)
    picks = draws.integers(buffer_rows, size=rows)
    buffer: list[int] = []
    for record, pick in zip(incoming.tolist(), picks.tolist(), strict=True):
        if len(buffer) < buffer_rows:
            buffer.append(record)
        else:
            yield buffer[pick]
            buffer[pick] = record
    draws.shuffle(buffer)
    yield from buffer


def compare(rows: int = 1_280_000, *, batch: int = 256, fragment_rows: int = 1000) -> list[dict[str, Any]]:
    """The numbers of every order, one entry each; shards of the buffered one have ten fragments.

    `rows` must be a multiple of `batch` and of a shard's rows.
    """
    orders: dict[tuple[str, int | None], IntArray] = {("uniform", None): uniform(rows)}
    for chunk_rows in (1024, 4096, 16384, 65536):
        orders["unclip, chunk_rows", chunk_rows] = ours(rows, fragment_rows, batch=batch, chunk_rows=chunk_rows)
    for buffer_rows in (1000, 16384, 65536):
        orders["shards and buffer", buffer_rows] = buffered(rows, 10 * fragment_rows, buffer_rows)
    return [
        {"order": name, "rows_in_memory": size, **quality(trained, batch=batch, fragment_rows=fragment_rows)}
        for (name, size), trained in orders.items()
    ]
