"""What `cluster.stream` hands to a worker, made in this process: the truth that the Ray stream is compared with."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from unclip.data.batches import make_batch
from unclip.data.manifest import SliceReader
from unclip.training.setup import PreparedRun


def local_batches(
    prepared: PreparedRun, *, rank: int = 0, world_size: int = 1, start: int = 0
) -> Iterator[dict[str, torch.Tensor]]:
    """This worker's share of every global batch of the run from position `start` on, without end."""
    order, spec, config = prepared.order, prepared.spec, prepared.config
    share = config.loop.global_batch_size // world_size
    reader = SliceReader(prepared.manifests, spec.columns())
    index = order.chunk_of(start)
    while True:
        chunk = order.chunk(index)
        index += 1
        table = reader.read(chunk.slices).take(chunk.permutation)
        for first in range(0, chunk.rows, share):
            positions = chunk.positions[first : first + share]
            if positions[0] < start or (positions[0] // share) % world_size != rank:
                continue
            batch = make_batch(table.slice(first, share), positions, spec, config.seed)
            yield {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}
