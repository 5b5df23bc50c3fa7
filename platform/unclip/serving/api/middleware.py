"""What every HTTP request goes through: an id, a key, security headers, one log line, meters; and nothing fails unanswered."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unclip.serving import context
from unclip.serving.context import Context
from unclip.serving.errors import ApiError, RateLimited
from unclip.serving.guards.keys import ApiKey, KeyLimits, KeyRing
from unclip.serving.guards.paths import path_of
from unclip.serving.messages.events import Disconnected
from unclip.serving.messages.failures import as_api_error
from unclip.serving.observe import logs, traces
from unclip.serving.observe.meters import Meters

_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}", re.ASCII)
_CLIENT_GONE = 499
"""In logs and meters: nobody is there to see it."""
_SECURITY = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}
"""What an answer says unless its route says something else."""
_LOCKED, _OPEN = "/v1/", "/v1/pictures/"
"""Keys are asked for below the one, but for the other: whoever knows a picture's name may see it, browsers among them."""


class Requests:
    """ASGI middleware around all others.

    Sets the `Context` that is known to all that is done for the request, and `request.state.key`.

    Args:
        keys: None: everybody may ask.
    """

    def __init__(self, app: ASGIApp, *, keys: KeyRing | None, limits: KeyLimits, meters: Meters) -> None:
        self._app, self._keys, self._limits, self._meters = app, keys, limits, meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        answer = _Answer(send, _request_id(headers.get("x-request-id")))
        began = time.monotonic()
        with traces.continued(headers), traces.span("request", method=scope["method"]) as span:
            key: ApiKey | None = None
            try:
                key = self._key(scope, headers)
            except ApiError as error:
                with context.within(Context(answer.request_id, None, traces.headers())):
                    await self._refuse(error, scope, receive, answer)
            else:
                scope.setdefault("state", {})["key"] = key
                with context.within(Context(answer.request_id, key.id if key else None, traces.headers())):
                    await self._answered(scope, receive, answer)
            status, route = answer.status or _CLIENT_GONE, _route(scope)
            span.set_attribute("http.route", route)
            span.set_attribute("http.response.status_code", status)
            seconds = time.monotonic() - began
            with context.within(Context(answer.request_id, key.id if key else None)):
                logs.event("request", method=scope["method"], route=route, status=status, seconds=round(seconds, 4))
        self._meters.count("unclip_serve_requests", route=route, status=str(status))
        self._meters.observe("unclip_serve_request_seconds", seconds, route=route)

    def _key(self, scope: Scope, headers: Headers) -> ApiKey | None:
        """Whose request it is; raises `Unauthorized` or `RateLimited`."""
        path = path_of(scope)
        if self._keys is None or not path.startswith(_LOCKED) or path.startswith(_OPEN):
            return None
        key = self._keys.of(headers.get("authorization"))
        try:
            self._limits.count_request(key)
        except RateLimited:
            self._meters.count("unclip_serve_key_limited", key=key.id, limit="requests")
            raise
        return key

    async def _answered(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        try:
            await self._app(scope, receive, answer.send)
        except Disconnected:
            return
        except Exception as error:
            await self._refuse(as_api_error(error), scope, receive, answer, cause=error)

    async def _refuse(
        self, error: ApiError, scope: Scope, receive: Receive, answer: _Answer, cause: Exception | None = None
    ) -> None:
        told(error, cause, self._meters)
        if answer.status is None:
            await error_response(error)(scope, receive, answer.send)


class _Answer:
    """What is sent of one answer, with the headers that all of them have."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self.request_id = send, request_id
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            for name, value in _SECURITY.items():
                headers.setdefault(name, value)
        await self._send(message)


def error_response(error: ApiError) -> Response:
    """OpenAI's error object."""
    return JSONResponse(error.body, error.status, error.headers)


def told(error: ApiError, cause: BaseException | None, meters: Meters) -> None:
    """Logs a refusal or failure and counts it; failures with the stack of their cause."""
    is_ours = error.status >= 500
    level = logging.ERROR if error.status == 500 else logging.INFO
    logs.event(
        "refused", level=level, status=error.status, code=error.code, error=(cause or error) if is_ours else None
    )
    meters.count("unclip_serve_refused", reason=error.code or error.kind)


def _request_id(given: str | None) -> str:
    """The client's, where it looks like one."""
    return given if given is not None and _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"


def _route(scope: Scope) -> str:
    """The template of the path, never what a client made up."""
    return getattr(scope.get("route"), "path", None) or "other"
