"""Whose request is being worked on: known to everything that is done for it, in every process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Context:
    """Of one API request.

    Args:
        request_id: in logs, traces and the answer's header.
        key_id: of the API key, never the key itself; None where the server asks for none.
        trace: W3C trace headers of the span that is open.
    """

    request_id: str = "-"
    key_id: str | None = None
    trace: Mapping[str, str] = field(default_factory=dict)


_CURRENT: ContextVar[Context] = ContextVar("unclip_request", default=Context())  # noqa: B039 (frozen)


def current() -> Context:
    """Of the request that this task works on."""
    return _CURRENT.get()


@contextmanager
def within(context: Context) -> Iterator[None]:
    """Everything in the block, and the tasks that begin in it, is done for this request."""
    token = _CURRENT.set(context)
    try:
        yield
    finally:
        _CURRENT.reset(token)
