"""The training order: which record is trained at which position of a run, as a function of the seed alone.

A source is read epoch after epoch. An epoch is a permutation of the fragments (row groups), laid end to end; stretches of it
are permuted row by row. So a record moves across the whole source with its fragment and mixes freely with the rows beside
it, and what is shuffled together is read with few, contiguous reads.

A run draws from one source or several: after k batches each has given k times its share, rounded; a sum, so where a run
stands in every source follows from k alone. Inside a batch the sources take turns evenly, so that every part of it, as
workers and micro-batches get them, has the ratio too. Nothing here knows the number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import lcm

import numpy as np
import numpy.typing as npt

from unclip.data.manifest import Slice

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Chunk:
    """A stretch of the run that is read and shuffled at once.

    Args:
        index: number of the chunk, counted over the whole run.
        first_position: position of its first sample, counted over the whole run.
        slices: what to read of each source, in this order.
        permutation: (rows,) sample `first_position + i` is row `permutation[i]` of what the slices give, source after
            source.
    """

    index: int
    first_position: int
    slices: tuple[tuple[Slice, ...], ...]
    permutation: IntArray

    @property
    def rows(self) -> int:
        return len(self.permutation)

    @property
    def positions(self) -> IntArray:
        return np.arange(self.first_position, self.first_position + self.rows, dtype=np.int64)


class SourceOrder:
    """The records of one source, epoch after epoch.

    Args:
        fragment_rows: rows of each fragment, in the manifest's order.
        seed: the run's seed.
        number: the source's number in the run: sources have orders of their own.
        remainder: rows that each epoch leaves out, others in each.
    """

    def __init__(self, fragment_rows: Sequence[int], seed: int, *, number: int, remainder: int) -> None:
        self._fragment_rows = np.asarray(fragment_rows, dtype=np.int64)
        self._seed = seed
        self._number = number
        self._layout: tuple[int, IntArray, IntArray] | None = None
        self.rows = int(self._fragment_rows.sum())
        self.remainder = remainder
        self.samples_per_epoch = self.rows - remainder

    def stretch(self, start: int, stop: int) -> tuple[tuple[Slice, ...], IntArray]:
        """The samples `start` to `stop` - 1 of all epochs, which are shuffled: what to read, and (rows,) its permutation.

        Each epoch is shuffled by itself, so that it has every sample once wherever stretches end.
        """
        if start == stop:
            return (), np.empty(0, dtype=np.int64)
        slices: list[Slice] = []
        permutations = []
        size = self.samples_per_epoch
        for epoch in range(start // size, -(-stop // size)):
            first, last = max(start - epoch * size, 0), min(stop - epoch * size, size)
            slices += self._slices(epoch, first, last)
            done = max(epoch * size - start, 0)
            permutations.append(done + self._generator(epoch, first + 1).permutation(last - first))
        return tuple(slices), np.concatenate(permutations)

    def _slices(self, epoch: int, start: int, stop: int) -> list[Slice]:
        """The parts of fragments between the rows `start` and `stop` of an epoch."""
        fragments, ends = self._laid_out(epoch)
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(ends, stop, side="left"))
        slices = []
        for place in range(first, last + 1):
            fragment = int(fragments[place])
            begin = int(ends[place] - self._fragment_rows[fragment])
            slices.append((fragment, max(start - begin, 0), min(stop, int(ends[place])) - begin))
        return slices

    def _laid_out(self, epoch: int) -> tuple[IntArray, IntArray]:
        """The fragments of an epoch in their order, and the row at which each ends; kept, as stretches follow on."""
        if self._layout is None or self._layout[0] != epoch:
            fragments = self._generator(epoch, 0).permutation(len(self._fragment_rows)).astype(np.int64)
            self._layout = epoch, fragments, np.cumsum(self._fragment_rows[fragments])
        return self._layout[1:]

    def _generator(self, epoch: int, stream: int) -> np.random.Generator:
        """Stream 0 orders the fragments of an epoch, stream n+1 the rows of its stretch that begins at n."""
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, epoch, stream, self._number])))


class RunOrder:
    """Chunks and positions of a run that goes round its sources as often as is wanted.

    Args:
        fragment_rows: for each source, rows of each fragment, in the manifest's order.
        seed: the run's seed, not negative.
        weights: the sources' shares, in any unit. After k batches a source has given k times its share of a batch to
            within one sample. Its share must be a sample or more, and not more than the source has rows.
        global_batch_size: samples of an optimiser step. A source alone ends its epochs with a batch, so that no batch has
            a sample twice; the rows left over (`remainder`, others in each epoch) are skipped. Sources of a mix go round at
            their own pace, in the midst of a batch, and leave out none.
        chunk_rows: rows shuffled together, a multiple of `global_batch_size`.
    """

    def __init__(
        self,
        fragment_rows: Sequence[Sequence[int]],
        seed: int,
        *,
        weights: Sequence[float] = (1.0,),
        global_batch_size: int,
        chunk_rows: int,
    ) -> None:
        if seed < 0:
            raise ValueError(f"seed = {seed}: must not be negative")
        if global_batch_size < 1 or chunk_rows < 1 or chunk_rows % global_batch_size:
            raise ValueError(
                f"chunk_rows = {chunk_rows}: must be a multiple of global_batch_size = {global_batch_size}"
            )
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.chunk_rows = chunk_rows
        shares = batch_shares(weights, global_batch_size)
        for number, (rows, share) in enumerate(zip(fragment_rows, shares, strict=True)):
            if share < 1:
                raise ValueError(f"weights[{number}] = {weights[number]}: less than a sample in a batch")
            if sum(rows) < share:
                raise ValueError(f"global_batch_size = {global_batch_size}: source {number} has only {sum(rows)} rows")
        self._unit = lcm(*(share.denominator for share in shares))
        self._upto = [int(share * self._unit) for share in accumulate(shares)]
        is_mix = len(shares) > 1
        self.sources = tuple(
            SourceOrder(rows, seed, number=number, remainder=0 if is_mix else sum(rows) % global_batch_size)
            for number, rows in enumerate(fragment_rows)
        )

    def taken(self, batches: int) -> tuple[int, ...]:
        """Samples that each source has given to the first `batches` batches of the run."""
        # A boundary between two sources moves by at least a sample a batch, so rounding them never goes back.
        ends = [(2 * batches * upto + self._unit) // (2 * self._unit) for upto in self._upto]
        return tuple(end - begin for begin, end in zip([0, *ends], ends, strict=False))

    def chunk_of(self, position: int) -> int:
        """Index of the chunk that holds `position`."""
        return position // self.chunk_rows

    def chunk(self, index: int) -> Chunk:
        """The chunk `index`, counted over the whole run from 0."""
        per_chunk = self.chunk_rows // self.global_batch_size
        taken = [self.taken(batch) for batch in range(index * per_chunk, (index + 1) * per_chunk + 1)]
        stretches = [
            source.stretch(start, stop) for source, start, stop in zip(self.sources, taken[0], taken[-1], strict=True)
        ]
        counts: IntArray = np.subtract(taken[1:], taken[:-1], dtype=np.int64)
        sizes = [len(permutation) for _, permutation in stretches]
        rows = np.concatenate(
            [begin + rows for begin, (_, rows) in zip(accumulate(sizes, initial=0), stretches, strict=False)]
        )
        return Chunk(
            index=index,
            first_position=index * self.chunk_rows,
            slices=tuple(slices for slices, _ in stretches),
            permutation=rows[_interleaved(counts)],
        )


def batch_shares(weights: Sequence[float], global_batch_size: int) -> list[Fraction]:
    """Samples of a batch that each source gives in the mean; exact for weights as they are written in decimals."""
    exact = [Fraction(str(weight)) for weight in weights]
    return [global_batch_size * weight / sum(exact) for weight in exact]


def _interleaved(counts: IntArray) -> IntArray:
    """(rows,) the order in which batches take the samples of sources that lie one after the other.

    Args:
        counts: (batches, sources) samples of each batch.

    Sample j of the c that a source gives to a batch stands at (j + 1/2) / c of it. So of two sources, any stretch of a
    batch has the batch's ratio to within one sample.
    """
    by_source = counts.T.reshape(-1)  # (sources * batches,), as the samples lie
    ends = np.cumsum(by_source)
    number = np.arange(ends[-1]) - np.repeat(ends - by_source, by_source)
    place = (number + 0.5) / np.repeat(by_source, by_source)
    batch = np.repeat(np.tile(np.arange(len(counts)), counts.shape[1]), by_source)
    return np.lexsort((place, batch)).astype(np.int64)  # stable: of sources at the same place the first comes first
