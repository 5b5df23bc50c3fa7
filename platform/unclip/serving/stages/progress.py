"""Steps of a picture on their way to a reader who may be slower than they are."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable

from unclip.serving.groups import Shown


class Progress:
    """Filled from any thread, read on the event loop where it was made.

    Of steps that nobody has read yet only the latest is kept, of pictures all: it holds few things however slow the reader.
    """

    def __init__(self) -> None:
        self._loop, self._bell = asyncio.get_running_loop(), asyncio.Event()
        self._lock = threading.Lock()
        self._shown: deque[Shown] = deque()

    def put(self, shown: Shown) -> None:
        """One step further."""
        with self._lock:
            if self._shown and self._shown[-1].picture is None:
                self._shown.pop()
            self._shown.append(shown)
        self.ring()

    def ring(self) -> None:
        """The reader looks whether it is done."""
        self._loop.call_soon_threadsafe(self._bell.set)

    async def until(self, is_done: Callable[[], bool]) -> AsyncIterator[Shown]:
        """All that is put before `is_done`; call `ring` when that changes."""
        done = False
        while not done:
            await self._bell.wait()
            self._bell.clear()
            done = is_done()
            with self._lock:
                shown, self._shown = self._shown, deque()
            for each in shown:
                yield each
