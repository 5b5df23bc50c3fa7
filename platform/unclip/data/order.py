"""The training order: which record is trained at which position of a run, as a function of the seed alone.

An epoch is a permutation of the fragments (row groups), laid end to end and cut into chunks of `chunk_rows` rows; rows
are permuted inside each chunk. So a record moves across the whole data set with its fragment and mixes freely with the
`chunk_rows` rows beside it; a chunk is read with few, contiguous reads. Nothing here knows the number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from unclip.data.manifest import Slice

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Chunk:
    """A stretch of the run that is read and shuffled at once.

    Args:
        index: number of the chunk, counted over the whole run.
        epoch: the epoch it belongs to; a chunk never crosses epochs.
        first_position: position of its first sample, counted over the whole run.
        slices: what to read, in this order.
        permutation: (rows,) sample `first_position + i` is row `permutation[i]` of what the slices give.
    """

    index: int
    epoch: int
    first_position: int
    slices: tuple[Slice, ...]
    permutation: IntArray

    @property
    def rows(self) -> int:
        return len(self.permutation)

    @property
    def positions(self) -> IntArray:
        return np.arange(self.first_position, self.first_position + self.rows, dtype=np.int64)


class RunOrder:
    """Chunks and positions of a run that goes round the data as often as is wanted.

    Args:
        fragment_rows: rows of each fragment, in the manifest's order.
        seed: the run's seed, not negative.
        global_batch_size: samples of an optimiser step. An epoch has a whole number of them; the rows left over
            (`remainder`, others in each epoch) are skipped.
        chunk_rows: rows shuffled together, a multiple of `global_batch_size`.
    """

    def __init__(self, fragment_rows: Sequence[int], seed: int, *, global_batch_size: int, chunk_rows: int) -> None:
        self._fragment_rows = np.asarray(fragment_rows, dtype=np.int64)
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.chunk_rows = chunk_rows
        if seed < 0:
            raise ValueError(f"seed = {seed}: must not be negative")
        if global_batch_size < 1 or chunk_rows < 1 or chunk_rows % global_batch_size:
            raise ValueError(
                f"chunk_rows = {chunk_rows}: must be a multiple of global_batch_size = {global_batch_size}"
            )
        rows = int(self._fragment_rows.sum())
        if rows < global_batch_size:
            raise ValueError(f"global_batch_size = {global_batch_size}: the data has only {rows} rows")
        self.remainder = rows % global_batch_size
        self.samples_per_epoch = rows - self.remainder
        self.chunks_per_epoch = -(-self.samples_per_epoch // chunk_rows)

    def chunk_of(self, position: int) -> int:
        """Index of the chunk that holds `position`."""
        epoch, offset = divmod(position, self.samples_per_epoch)
        return epoch * self.chunks_per_epoch + offset // self.chunk_rows

    def chunk(self, index: int) -> Chunk:
        """The chunk `index`, counted over the whole run from 0."""
        epoch, number = divmod(index, self.chunks_per_epoch)
        start = number * self.chunk_rows
        stop = min(start + self.chunk_rows, self.samples_per_epoch)
        permutation = _generator(self.seed, epoch, number + 1).permutation(stop - start)
        return Chunk(
            index=index,
            epoch=epoch,
            first_position=epoch * self.samples_per_epoch + start,
            slices=tuple(self._slices(epoch, start, stop)),
            permutation=permutation.astype(np.int64),
        )

    def _slices(self, epoch: int, start: int, stop: int) -> list[Slice]:
        """The parts of fragments between the rows `start` and `stop` of an epoch."""
        fragments, ends = _laid_out(self._fragment_rows.tobytes(), self.seed, epoch)
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(ends, stop, side="left"))
        slices = []
        for place in range(first, last + 1):
            fragment = int(fragments[place])
            begin = int(ends[place] - self._fragment_rows[fragment])
            slices.append((fragment, max(start - begin, 0), min(stop, int(ends[place])) - begin))
        return slices


@lru_cache(maxsize=4)
def _laid_out(fragment_rows: bytes, seed: int, epoch: int) -> tuple[IntArray, IntArray]:
    """The fragments of an epoch in their order, and the row at which each ends."""
    rows = np.frombuffer(fragment_rows, dtype=np.int64)
    fragments = _generator(seed, epoch, 0).permutation(len(rows)).astype(np.int64)
    return fragments, np.cumsum(rows[fragments])


def _generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    """Stream 0 orders the fragments of an epoch, stream n+1 the rows of its chunk n."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, stream])))
