"""Requests of several units for one engine, among them such as had better be alone in it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

from unclip.generation.engine.request import Request, Result, Ticket
from unclip.generation.engine.worker import EngineThread

T = TypeVar("T")

_PATIENCE_S = 3600.0
"""For room in the engine; after that it hangs."""


class Feeder:
    """Hands requests to an engine; safe to use from any thread."""

    def __init__(self, engine: EngineThread) -> None:
        self._engine = engine
        self._changed = threading.Condition()
        self._under_way = 0
        self._is_closed = False

    def submit(self, request: Request) -> Ticket:
        """Takes a request on, together with others; raises as `EngineThread.submit`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_closed)
            self._under_way += 1
        try:
            ticket = self._engine.submit(request, patience=_PATIENCE_S)
        except BaseException:
            self._leave()
            raise
        ticket.add_done_callback(lambda _: self._leave())
        return ticket

    def alone(self, request: Request) -> Result:
        """What comes of a request that shares no batch with any other; raises what its ticket does."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_closed)
            self._is_closed = True
            self._changed.wait_for(lambda: not self._under_way)
        try:
            return self._engine.submit(request, patience=_PATIENCE_S).result()
        finally:
            with self._changed:
                self._is_closed = False
                self._changed.notify_all()

    def _leave(self) -> None:
        with self._changed:
            self._under_way -= 1
            self._changed.notify_all()


def ahead(items: Iterable[T], most: int) -> Iterator[T]:
    """The items in their order, each taken up to `most` items before it is handed on: what it began runs meanwhile."""
    iterator = iter(items)
    held = deque(islice(iterator, most))
    while held:
        yield held.popleft()
        held.extend(islice(iterator, 1))
