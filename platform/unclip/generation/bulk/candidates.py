"""The pictures of a row while they are made: which of them are kept, and where their bytes wait until all are there."""

from __future__ import annotations

import heapq
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from unclip.generation.bulk.rows import Asked
from unclip.generation.bulk.shards import Kept

_IN_MEMORY = 64 * 2**20
"""Bytes of a row's pictures that wait in memory; more wait on the local disk."""


class _Waiting(NamedTuple):
    """An encoded picture, and where its sizes (side in pixels, bytes) lie one after the other."""

    score: float | None
    offset: int
    sizes: tuple[tuple[int, int], ...]


class Candidates:
    """A row's pictures, none of which counts before all are there; they come in the order of their numbers.

    Args:
        numbers: of the candidates that are made now.
    """

    def __init__(self, asked: Asked, numbers: Sequence[int]) -> None:
        self.asked, self.numbers = asked, numbers
        self.has_failed = False
        self._awaited = len(numbers)
        self._keeps_all = asked.n == len(asked.seeds)
        self._best: list[tuple[float, int]] = []  # a heap of (score, -number): the worst is the first
        self._waiting: dict[int, _Waiting] = {}
        self._bytes = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 (open as long as the row)

    @property
    def is_complete(self) -> bool:
        """Whether all candidates have come."""
        return not self._awaited

    def wants(self, number: int, score: float | None) -> bool:
        """Whether a candidate is among the best up to now; of equal ones the first is."""
        if self._keeps_all:
            return True
        assert score is not None
        if len(self._best) < self.asked.n:
            heapq.heappush(self._best, (score, -number))
            return True
        _, worst = heapq.heappushpop(self._best, (score, -number))
        self._waiting.pop(-worst, None)
        return -worst != number

    def take(self, number: int, score: float | None, images: Mapping[int, bytes] | None) -> None:
        """A candidate, encoded; None where it was not wanted."""
        self._awaited -= 1
        is_wanted = self._keeps_all or any(-kept == number for _, kept in self._best)
        if images is None or not is_wanted:  # others that have come since may be better
            return
        offset = self._bytes.seek(0, 2)
        for image in images.values():
            self._bytes.write(image)
        self._waiting[number] = _Waiting(score, offset, tuple((side, len(image)) for side, image in images.items()))

    def kept(self) -> Iterator[Kept]:
        """The pictures in the order of their numbers; nothing is left then."""
        for number in sorted(self._waiting):
            score, offset, sizes = self._waiting[number]
            self._bytes.seek(offset)
            yield Kept(self.asked, number, score, {side: self._bytes.read(size) for side, size in sizes})
        self.close()

    def fail(self) -> None:
        """There will be no pictures."""
        self.has_failed = True
        self.close()

    def close(self) -> None:
        self._waiting.clear()
        self._bytes.close()
