"""Traces: spans as a collector gets them, over HTTP and from process to process."""

from __future__ import annotations

import asyncio
import gzip
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from unclip.serving.config import TracingConfig
from unclip.serving.observe import traces

CLIENT = {"traceparent": "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"}


class Collector(ThreadingHTTPServer):
    """Takes spans by OTLP over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Take)
        self.requests: list[ExportTraceServiceRequest] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/traces"

    @property
    def spans(self) -> dict[str, Span]:
        """By name, once this process has sent them all."""
        traces.close()
        groups = [group for request in self.requests for each in request.resource_spans for group in each.scope_spans]
        return {span.name: span for group in groups for span in group.spans}

    @property
    def processes(self) -> set[str]:
        found = [each.resource.attributes for request in self.requests for each in request.resource_spans]
        return {item.value.string_value for group in found for item in group if item.key == "unclip.process"}


class _Take(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            content = gzip.decompress(content)
        self.server.requests.append(ExportTraceServiceRequest.FromString(content))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        traces.close()
        server.shutdown()
        thread.join()


def attributes(span: Span) -> dict[str, object]:
    return {item.key: getattr(item.value, str(item.value.WhichOneof("value"))) for item in span.attributes}


def test_spans_of_a_request_reach_the_collector(collector: Collector) -> None:
    traces.configure(TracingConfig(endpoint=collector.endpoint), "ingress")
    with (
        traces.continued(CLIENT),
        traces.span("request", route="/v1/models", pictures=2, missing=None),
        traces.span("group", stages="prior,decoder"),
    ):
        traces.record("stage", began=1000.25, ended=1002.5, stage="prior")
    spans = collector.spans
    assert collector.processes == {"ingress"}
    assert set(spans) == {"request", "group", "stage"}
    assert {span.trace_id.hex() for span in spans.values()} == {CLIENT["traceparent"].split("-")[1]}
    assert spans["request"].parent_span_id.hex() == CLIENT["traceparent"].split("-")[2]
    assert spans["group"].parent_span_id == spans["request"].span_id
    assert spans["stage"].parent_span_id == spans["group"].span_id
    assert attributes(spans["request"]) == {"unclip.route": "/v1/models", "unclip.pictures": 2}
    assert (spans["stage"].start_time_unix_nano, spans["stage"].end_time_unix_nano) == (
        1_000_250_000_000,
        1_002_500_000_000,
    )


def test_a_trace_goes_on_where_the_call_is_worked_on(collector: Collector) -> None:
    """As from the process that speaks HTTP to that of a group, with nothing in common but the headers."""
    traces.configure(TracingConfig(endpoint=collector.endpoint), "decoder")
    with traces.span("call"):
        carried = traces.headers()

    def elsewhere() -> None:
        assert traces.headers() == {}
        with traces.continued(carried), traces.span("work"):
            pass

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    spans = collector.spans
    assert spans["work"].parent_span_id == spans["call"].span_id
    assert spans["work"].trace_id == spans["call"].trace_id


def test_errors_are_told_by_type_and_ends_by_the_client_are_none(collector: Collector) -> None:
    traces.configure(TracingConfig(endpoint=collector.endpoint), "ingress")
    with pytest.raises(ValueError, match="red heart"), traces.span("broken"):
        raise ValueError("prompt = 'a red heart'")
    with pytest.raises(asyncio.CancelledError), traces.span("cancelled"):
        raise asyncio.CancelledError
    with traces.span("fine"):
        pass
    spans = collector.spans
    assert attributes(spans["broken"]) == {"error.type": "ValueError"}
    assert {name: span.status.code for name, span in spans.items()} == {
        "broken": Status.STATUS_CODE_ERROR,
        "cancelled": Status.STATUS_CODE_UNSET,
        "fine": Status.STATUS_CODE_UNSET,
    }
    assert b"red heart" not in b"".join(request.SerializeToString() for request in collector.requests)


def test_tasks_have_their_own_spans(collector: Collector) -> None:
    traces.configure(TracingConfig(endpoint=collector.endpoint), "ingress")

    async def picture(number: int) -> None:
        with traces.span(f"picture {number}"):
            await asyncio.sleep(0.01 * (3 - number))
            with traces.span(f"call {number}"):
                await asyncio.sleep(0.01)

    async def request() -> None:
        with traces.span("request"):
            await asyncio.gather(*(picture(number) for number in range(3)))

    asyncio.run(request())
    spans = collector.spans
    for number in range(3):
        assert spans[f"picture {number}"].parent_span_id == spans["request"].span_id
        assert spans[f"call {number}"].parent_span_id == spans[f"picture {number}"].span_id


@pytest.mark.parametrize(("share", "client", "kept"), [(0.0, None, 0), (0.0, CLIENT, 1), (1.0, None, 1)])
def test_share_counts_for_requests_without_a_decision(
    collector: Collector, share: float, client: dict[str, str] | None, kept: int
) -> None:
    traces.configure(TracingConfig(endpoint=collector.endpoint, share=share), "ingress")
    with traces.continued(client or {}), traces.span("request"):
        pass
    assert len(collector.spans) == kept


def test_without_a_collector_the_trace_of_a_client_is_handed_on() -> None:
    traces.configure(TracingConfig(), "ingress")
    with traces.continued(CLIENT), traces.span("request") as opened:
        assert not opened.is_recording()
        assert traces.headers() == CLIENT
    with traces.continued({"traceparent": "nonsense", "tracestate": ","}), traces.span("request"):
        assert traces.headers() == {}


def test_a_collector_without_the_sdk_is_an_error_that_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['opentelemetry.sdk.resources'] = None\n"
        "from unclip.serving.config import TracingConfig\n"
        "from unclip.serving.observe import traces\n"
        "traces.configure(TracingConfig(), 'ingress')\n"
        "with traces.span('request'): pass\n"
        "traces.configure(TracingConfig(endpoint='http://127.0.0.1:1/v1/traces'), 'ingress')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "ConfigError: tracing.endpoint = http://127.0.0.1:1/v1/traces: install unclip[otel]" in done.stderr
