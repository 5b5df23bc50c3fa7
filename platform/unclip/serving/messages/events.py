"""Server-sent events: what is told while pictures are drawn, and the answer that carries it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

PING_S = 10.0
"""Silence after which a comment is sent, so that nothing on the way takes the connection for dead."""
MEDIA_TYPE = "text/event-stream"


@dataclass(frozen=True)
class Event:
    """A name, and a JSON object; without a name, a comment that says that the server is there."""

    name: str = ""
    data: Mapping[str, Any] | None = None

    def encode(self) -> bytes:
        """As it is sent."""
        if not self.name:
            return b": here\n\n"
        return f"event: {self.name}\ndata: {json.dumps(self.data, separators=(',', ':'))}\n\n".encode()


HERE = Event()
"""The comment."""


async def next_of(told: asyncio.Queue[Event | None]) -> Event | None:
    """The next that is told; `HERE` after a silence."""
    try:
        async with asyncio.timeout(PING_S):  # wait_for of Python 3.11 loses a cancellation that comes with an event
            return await told.get()
    except TimeoutError:
        return HERE


class Disconnected(Exception):
    """The client is gone; there is nobody to answer."""


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """What `work` returns; raises `Disconnected`, with `work` cancelled, as soon as the client is gone.

    The body of the request has been read: all that `receive` still tells is that.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Disconnected
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(Response):
    """An answer of events. What is raised before the first one is an error of its own, with its status.

    Args:
        events: closed when the client is gone, and when it has told all.
    """

    media_type = MEDIA_TYPE

    def __init__(self, events: AsyncGenerator[Event, None]) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_gone(self._send(send), receive)

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events):
            first = await anext(self._events)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": first.encode(), "more_body": True})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
