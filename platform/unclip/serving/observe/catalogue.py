"""What a server counts and measures, by name; Prometheus, the dashboard and docs/observability.md know these names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)


@dataclass(frozen=True)
class Meter:
    """A thing that is counted or measured.

    Args:
        kind: a counter only rises; a gauge is what it is now; a histogram has the seconds of single events.
        description: in Prometheus.
        labels: each value of it has all of these, and no others.
        buckets: of a histogram, upper bounds in seconds, rising.
    """

    kind: Kind
    description: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


def _counter(description: str, *labels: str) -> Meter:
    return Meter("counter", description, labels)


def _gauge(description: str, *labels: str) -> Meter:
    return Meter("gauge", description, labels)


def _seconds(description: str, *labels: str) -> Meter:
    return Meter("histogram", description, labels, _SECONDS)


_API = {
    "requests": _counter("HTTP requests by path template and status", "route", "status"),
    "request_seconds": _seconds("From a request's first byte to the last one of its answer", "route"),
    "pictures": _counter(
        "Pictures that were asked for, by kind (generation, edit, ...) and outcome (finished, failed, cancelled, expired)",
        "kind",
        "outcome",
    ),
    "in_flight": _gauge("Pictures under way in a process that speaks HTTP"),
    "refused": _counter("Requests answered by an error, by its code, or its type where it has none", "reason"),
    "policy_refusals": _counter(
        "Prompts and pictures that the content policy refused, by the hook that did", "subject", "hook"
    ),
    "key_limited": _counter("Requests beyond a limit of their key (requests, pictures)", "key", "limit"),
    "retries": _counter("Calls of a group that were made once more, by the error before", "group", "reason"),
}

_ENGINE = {
    "queue_seconds": _seconds("From a picture's arrival in a group to its first step there", "group"),
    "stage_seconds": _seconds(
        "Of a picture in a stage, waiting for a slot between two stages included", "group", "stage"
    ),
    "queued_steps": _gauge("Row steps that waiting and running rows still have to take", "group"),
    "engine_requests": _counter("Pictures that an engine has ended with, by how", "group", "end"),
    "engine_waiting": _gauge("Pictures of which a sample waits for a slot", "group"),
    "engine_running": _gauge("Pictures under way that wait for nothing", "group"),
    "rows_running": _gauge("Rows that take steps", "group", "stage"),
    "rows_waiting": _gauge("Rows that wait for a slot", "group", "stage"),
    "slots": _gauge("Rows that a stage may have at once", "group", "stage"),
    "steps": _counter("Denoising steps of a stage's batch", "group", "stage"),
    "step_seconds": _counter("Seconds spent in these steps", "group", "stage"),
    "rows": _counter("Rows of these steps, added up", "group", "stage"),
    "forward_rows": _counter(
        "Rows that the network computed, unconditional ones included, padding not", "group", "stage"
    ),
    "padding_rows": _counter("Rows that the network computed for nothing", "group", "stage"),
    "revision": _gauge(
        "1 for the digest of the bundle that a group uses, 0 for those that it used before", "group", "digest"
    ),
    "gpu_used_bytes": _gauge("Memory of a GPU that is taken, by whomever", "device"),
    "gpu_total_bytes": _gauge("Memory of a GPU", "device"),
}

CATALOGUE: Mapping[str, Meter] = {f"unclip_serve_{name}": meter for name, meter in (_API | _ENGINE).items()}
"""All meters by their full names."""
