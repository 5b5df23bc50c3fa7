"""An HTTP proxy that does to requests what object stores and networks do on bad days, by a plan that can be repeated.

What happens to a request depends on (seed, what is asked for, how often it was asked for before) and on nothing else, so
not on which thread comes first. One request is disturbed at most `most` times in a row, then let through.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

INTERNAL_ERROR = "internal_error"
SLOW_DOWN = "slow_down"
SLOW_DOWN_RETRY_AFTER = "slow_down_retry_after"
BAD_GATEWAY = "bad_gateway"
RESET_BEFORE = "reset_before"
RESET_AFTER = "reset_after"
CUT_BODY = "cut_body"
SLOW_BODY = "slow_body"
FLIPPED_BODY = "flipped_body"
RANGE_IGNORED = "range_ignored"
KEYS_REFUSED = "keys_refused"
ACCESS_DENIED = "access_denied"
STALL = "stall"
PASSING = (
    INTERNAL_ERROR,
    SLOW_DOWN,
    SLOW_DOWN_RETRY_AFTER,
    BAD_GATEWAY,
    RESET_BEFORE,
    RESET_AFTER,
    CUT_BODY,
    SLOW_BODY,
)
"""Faults that any client gets over by asking again."""
_ERROR = "<Error><Key>some</Key><Code>{}</Code><Message>not now</Message></Error>"
_ANSWERS = {
    INTERNAL_ERROR: (500, _ERROR.format("InternalError"), {}),
    SLOW_DOWN: (503, _ERROR.format("SlowDown"), {}),
    SLOW_DOWN_RETRY_AFTER: (503, _ERROR.format("SlowDown"), {"Retry-After": "1"}),
    BAD_GATEWAY: (502, "<html>Bad Gateway", {}),
    ACCESS_DENIED: (403, _ERROR.format("AccessDenied"), {}),
    KEYS_REFUSED: (200, f"<DeleteResult>{_ERROR.format('InternalError')}</DeleteResult>", {}),
}
"""Status, body and headers of what is answered without asking the server."""
_SLOW_PIECES = 5
_PIECE_PAUSE_S = 0.02
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "proxy-connection"}
_MAX_BODY = 2**28


@dataclass
class Plan:
    """Which requests are disturbed, and how.

    Args:
        kinds: one of them is drawn for each disturbance.
        rate: share of the attempts that are disturbed.
        most: disturbances of one request in a row.
        methods: HTTP methods concerned.
        containing: only requests for an address with this in it.
    """

    seed: int = 0
    kinds: tuple[str, ...] = PASSING
    rate: float = 1.0
    most: int = 1
    methods: tuple[str, ...] = ("GET", "PUT", "POST", "HEAD", "DELETE")
    containing: str = ""
    injected: Counter[str] = field(default_factory=Counter)
    """How often each kind was done."""
    requests: list[str] = field(default_factory=list)
    """`METHOD address` of every request while the plan was on, disturbed or not."""
    access_keys: set[str] = field(default_factory=set)
    """Who signed them."""
    _asked: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def draw(self, method: str, target: str, headers: Message) -> str | None:
        """What to do to this request; None is nothing."""
        asked_for = f"{method} {target} {headers.get('Range', '')}"
        signed_by = re.search(r"Credential=([^/]+)/", headers.get("Authorization", ""))
        with self._lock:
            self.requests.append(f"{method} {target}")
            self.access_keys |= set(signed_by.groups()) if signed_by else set()
            times = self._asked[asked_for]
            self._asked[asked_for] += 1
            if method not in self.methods or self.containing not in target or times >= self.most:
                return None
            digest = hashlib.sha256(f"{self.seed} {asked_for} {times}".encode()).digest()
            if int.from_bytes(digest[:8], "big") >= self.rate * 2**64:
                return None
            kind = self.kinds[int.from_bytes(digest[8:12], "big") % len(self.kinds)]
            self.injected[kind] += 1
            return kind


class FaultyProxy:
    """Runs in threads of this process on a free port while its block lasts; without a plan everything passes."""

    def __init__(self, host: str, port: int) -> None:
        self._upstream = (host, port)
        self.plan: Plan | None = None
        self.resume = threading.Event()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *details: object) -> None:
        self.resume.set()
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def faults(self, **settings: Any) -> Iterator[Plan]:
        """A plan with these settings for the block."""
        self.plan = plan = Plan(**settings)
        self.resume.clear()
        try:
            yield plan
        finally:
            self.plan = None
            self.resume.set()  # of what stalls

    def forward(
        self, handler: BaseHTTPRequestHandler, body: bytes, dropped: set[str]
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        """Status, headers and body of the server's answer to the request without its headers in `dropped`."""
        connection = http.client.HTTPConnection(*self._upstream, timeout=60)
        headers = {name: value for name, value in handler.headers.items() if name.lower() not in dropped}
        try:
            connection.request(handler.command, handler.path, body=body, headers=headers)
            answer = connection.getresponse()
            kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP]
            return answer.status, kept, answer.read()
        finally:
            connection.close()


class _Handler(BaseHTTPRequestHandler):
    owner: FaultyProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Says nothing."""

    def _handle(self) -> None:
        body = self._request_body()
        plan = self.owner.plan
        kind = plan.draw(self.command, self.path, self.headers) if plan else None
        if kind == STALL:
            self.owner.resume.wait()
        if kind in (RESET_BEFORE, STALL):
            self._reset()
        elif kind in _ANSWERS:
            self._refuse(*_ANSWERS[kind])
        else:
            dropped = _HOP_BY_HOP | {"range"} if kind == RANGE_IGNORED else _HOP_BY_HOP
            status, headers, content = self.owner.forward(self, body, dropped)
            if kind == RESET_AFTER:
                self._reset()
            else:
                self._answer(status, headers, content, kind)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle

    def _request_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        size = int(self.headers.get("Content-Length", 0))
        assert size <= _MAX_BODY
        return self.rfile.read(size)

    def _refuse(self, status: int, content: str, headers: dict[str, str]) -> None:
        self._answer(status, [*headers.items(), ("Content-Type", "application/xml")], content.encode(), None)

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, kind: str | None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD" and status != 204:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind == CUT_BODY:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self._reset()
        elif kind == SLOW_BODY:
            step = max(1, -(-len(content) // _SLOW_PIECES))
            for start in range(0, len(content), step):
                self.wfile.write(content[start : start + step])
                self.wfile.flush()
                time.sleep(_PIECE_PAUSE_S)
        elif kind == FLIPPED_BODY and content:
            self.wfile.write(bytes([content[0] ^ 1]) + content[1:])
        else:
            self.wfile.write(content)

    def _reset(self) -> None:
        """Ends the connection without a word: the client gets ECONNRESET."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
