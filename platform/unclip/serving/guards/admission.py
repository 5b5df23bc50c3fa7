"""How many pictures are under way at once in a process that speaks HTTP; who comes when it is full is told when to come again."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from unclip.serving.errors import InvalidRequest, Overloaded

_WINDOW = 64
"""Of so many pictures, the last ones, the rate is measured."""
_LONGEST_S = 60
_UNMEASURED_S = 2
"""What is said before any picture was finished."""


class Admission:
    """Counts pictures from their admission to their end. For one thread: that of the event loop.

    Args:
        pictures: most at once.
        clock: seconds.
    """

    def __init__(self, pictures: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        if pictures < 1:
            raise ValueError(f"pictures = {pictures}: must be at least 1")
        self._pictures, self._clock = pictures, clock
        self._in_flight = 0
        self._busy_before, self._busy_since = 0.0, 0.0
        self._finished: deque[float] = deque([0.0], maxlen=_WINDOW + 1)

    @property
    def in_flight(self) -> int:
        """Pictures under way."""
        return self._in_flight

    @contextmanager
    def take(self, count: int) -> Iterator[None]:
        """The block makes `count` pictures.

        Raises `Overloaded` where there is no room for all of them now, and `InvalidRequest` where there never is.
        """
        if count < 1:
            raise ValueError(f"count = {count}: must be at least 1")
        if count > self._pictures:
            raise InvalidRequest(f"{count} pictures: this server draws at most {self._pictures} at once", param="n")
        missing = self._in_flight + count - self._pictures
        if missing > 0:
            raise Overloaded(
                f"{self._in_flight} pictures are under way, and at most {self._pictures} may be",
                retry_after=self.retry_after(missing),
            )
        if not self._in_flight:
            self._busy_since = self._clock()
        self._in_flight += count
        try:
            yield
            self._finished.extend([self._busy_seconds] * count)
        finally:
            self._busy_before, self._busy_since = self._busy_seconds, self._clock()
            self._in_flight -= count

    def retry_after(self, pictures: int = 1) -> int:
        """Whole seconds in which so many pictures are finished, by the rate of the last ones: from 1 to 60."""
        seconds, finished = self._busy_seconds - self._finished[0], len(self._finished) - 1
        if not finished:
            return _UNMEASURED_S
        return min(max(math.ceil(pictures * seconds / finished), 1), _LONGEST_S)

    @property
    def _busy_seconds(self) -> float:
        """How long pictures were under way up to now; without them the rate would fall while nobody asks."""
        return self._busy_before + (self._clock() - self._busy_since if self._in_flight else 0.0)
