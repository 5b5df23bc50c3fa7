"""Logs as JSON lines, each with the request that it belongs to. Prompts, keys and pictures have no place in them."""

from __future__ import annotations

import json
import logging
import math
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from opentelemetry import trace

from unclip.serving import context
from unclip.serving.errors import ApiError

_LOGGER = logging.getLogger("unclip.serving")
_PRIVATE = frozenset({"prompt", "negative_prompt", "source_prompt", "input", "key", "authorization", "image", "mask"})
"""Fields of requests that nobody may read in a log."""
_MESSAGE_CHARACTERS = 500
_FRAMES = 30


def configure(level: int = logging.INFO) -> None:
    """Writes what the loggers of unclip say to stderr, a JSON object a line; asked again, only the level changes."""
    logger = logging.getLogger("unclip")
    logger.setLevel(level)
    if not any(isinstance(handler, JsonHandler) for handler in logger.handlers):
        logger.addHandler(JsonHandler())
        logger.propagate = False


def event(name: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """One line: `name` is what happened, as `picture_finished`, and `fields` all there is to know of it.

    Exceptions among the fields become their type, message and stack. `ValueError` for a field that is a request's content;
    where the operator wants to read refused prompts, the audit calls them `text`.
    """
    if told := _PRIVATE & fields.keys():
        raise ValueError(f"{name}: a log line may not have {', '.join(sorted(told))}")
    _LOGGER.log(level, name, extra={"unclip_fields": fields})


class JsonHandler(logging.Handler):
    """Of an `event` its name and fields, of any other record its message and exception; of both time, request and span."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)

    def format(self, record: logging.LogRecord) -> str:
        here = context.current()
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "request_id": here.request_id,
            "key_id": here.key_id,
        }
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            line["trace_id"] = f"{span.trace_id:032x}"
        fields: Mapping[str, Any] | None = getattr(record, "unclip_fields", None)
        line["event" if fields is not None else "message"] = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = record.exc_info[1]
        return json.dumps(_plain({**line, **(fields or {})}), ensure_ascii=False)


def described(error: BaseException) -> dict[str, Any]:
    """Type, message and stack (the innermost frame last) of an exception, and of the one that caused it.

    Of an `ApiError` its code and field in place of the message, which names what the client sent.
    """
    found: dict[str, Any] = {"type": type(error).__qualname__}
    if isinstance(error, ApiError):
        found |= {"code": error.code, "param": error.param}
    else:
        found["message"] = str(error)[:_MESSAGE_CHARACTERS]
    found["stack"] = _stack(error.__traceback__)
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        found["cause"] = described(cause)
    return found


def _stack(trace_back: TracebackType | None) -> list[str]:
    frames = traceback.extract_tb(trace_back)[-_FRAMES:]
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]


def _plain(value: Any) -> Any:
    """What JSON can say of it."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case BaseException():
            return described(value)
        case Mapping():
            return {str(key): _plain(each) for key, each in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(each) for each in value]
    return str(value)[:_MESSAGE_CHARACTERS]
