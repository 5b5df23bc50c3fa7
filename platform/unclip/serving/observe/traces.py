"""Traces by OpenTelemetry: what was done for a request, in which process, from when to when.

Without a collector all of it does nothing, but for handing the trace of a client on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from unclip.config.base import ConfigError
from unclip.serving.config import TracingConfig

Attribute = str | int | float | bool | None
"""Of a span; None is left out."""

_W3C = TraceContextTextMapPropagator()
_FLUSH_MILLISECONDS = 5000
_provider: Any = None


def configure(config: TracingConfig, process: str) -> None:
    """Sends the spans of this process to the collector, in the background; replaces what was configured before.

    Args:
        process: what this process is, as `ingress` or `decoder`; the attribute `unclip.process` of its spans.

    Raises `ConfigError` where there is a collector and no OpenTelemetry SDK.
    """
    global _provider
    close()
    if config.endpoint is None:
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ImportError as error:
        raise ConfigError(f"tracing.endpoint = {config.endpoint}: install unclip[otel], or set it to null") from error
    resource = Resource.create({"service.name": "unclip", "unclip.process": process})
    _provider = TracerProvider(resource=resource, sampler=ParentBased(TraceIdRatioBased(config.share)))
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=config.endpoint)))


def close() -> None:
    """Sends what is left, for 5 seconds at most, and then nothing more."""
    global _provider
    if _provider is not None:
        _provider.force_flush(_FLUSH_MILLISECONDS)
        _provider.shutdown()
        _provider = None


@contextmanager
def span(name: str, **attributes: Attribute) -> Iterator[trace.Span]:
    """The block is a span within the one that is open; what it raises is told by its type alone, which holds no prompt."""
    opened = _tracer().start_span(name, attributes=_known(attributes))
    token = otel_context.attach(trace.set_span_in_context(opened))
    try:
        yield opened
    except BaseException as error:
        opened.set_attribute("error.type", type(error).__qualname__)
        if not isinstance(error, asyncio.CancelledError | GeneratorExit):
            opened.set_status(trace.StatusCode.ERROR)
        raise
    finally:
        otel_context.detach(token)
        opened.end()


def record(name: str, *, began: float, ended: float, **attributes: Attribute) -> None:
    """A span that is over, from `began` to `ended` in unix seconds, within the one that is open."""
    past = _tracer().start_span(name, attributes=_known(attributes), start_time=_nanoseconds(began))
    past.end(_nanoseconds(ended))


def headers() -> dict[str, str]:
    """W3C headers of the span that is open, for `Context.trace` and for calls of other services; empty where none is."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier)
    return carrier


@contextmanager
def continued(headers: Mapping[str, str]) -> Iterator[None]:
    """Spans of the block belong to the trace of these W3C headers, lower case; headers that are none are ignored."""
    token = otel_context.attach(_W3C.extract(dict(headers)))
    try:
        yield
    finally:
        otel_context.detach(token)


def _tracer() -> trace.Tracer:
    """Ours where it is configured, otherwise the one of whoever runs the process, which by itself does nothing."""
    return (_provider or trace).get_tracer("unclip.serving")


def _known(attributes: Mapping[str, Attribute]) -> dict[str, str | int | float | bool]:
    return {f"unclip.{name}": value for name, value in attributes.items() if value is not None}


def _nanoseconds(unix_seconds: float) -> int:
    return round(unix_seconds * 1e9)
