"""What stands before the app in a process behind Ray Serve's proxies."""

from __future__ import annotations

import asyncio

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unclip.serving.errors import Overloaded

_LOOK_S = 0.05
_RETRY_AFTER_S = 5


class Doors:
    """Counts the HTTP requests of a process, and refuses further ones once they are shut."""

    def __init__(self) -> None:
        self.open = 0
        self.shut = False

    async def drain(self, patience_s: float) -> bool:
        """Shuts them and waits until nobody is in; whether that came to pass in time."""
        self.shut = True
        deadline = asyncio.get_running_loop().time() + patience_s
        while self.open and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_LOOK_S)
        return not self.open


class Gate:
    """ASGI middleware: requests pass `doors`, and answers leave without `x-request-id`, which Serve's proxy puts there."""

    def __init__(self, app: ASGIApp, doors: Doors) -> None:
        self._app, self._doors = app, doors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name, value) for name, value in message["headers"] if name.lower() != b"x-request-id"]
                message = {**message, "headers": headers}
            await send(message)

        if self._doors.shut:
            error = Overloaded("the server is being stopped", retry_after=_RETRY_AFTER_S)
            refusal = JSONResponse(error.body, error.status, {"retry-after": str(error.retry_after)})
            await refusal(scope, receive, send)
            return
        self._doors.open += 1
        try:
            await self._app(scope, receive, send_on)
        finally:
            self._doors.open -= 1
