"""Ports: connections from every node to every other, as raylets and workers make them."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ray
import ray._private.worker

from unclip.cluster.checkup.nodes import Probes
from unclip.cluster.checkup.result import Finding, failed, ok, warning

CONNECT_S = 5.0
_AT_ONCE = 64
_SHOWN = 4
_FOR_PEOPLE = ("dashboard", "metrics")
"""Which runs do without."""


@dataclass(frozen=True)
class Target:
    """A service that listens."""

    service: str
    node: str
    address: str
    port: int

    def __str__(self) -> str:
        return f"{self.service} of {self.node} ({self.address}:{self.port})"


def targets_of(probes: Probes) -> list[Target]:
    """What every node should reach: the head's services, and of each node the raylet's and a worker's."""
    head = next((place for place in probes.places if place.is_head), None)
    found = []
    for service, address in head_services().items():
        host, _, number = address.rpartition(":")
        found.append(Target(service, head.name if head else "the head", host, int(number)))
    for place in probes.places:
        port = probes.worker_port(place)
        ports = place.ports | ({"worker": port} if port else {})
        found += [Target(service, place.name, place.address, number) for service, number in ports.items()]
    return found


def head_services() -> dict[str, str]:
    """host:port by name; the dashboard only where it runs."""
    services = {"GCS": ray.get_runtime_context().gcs_address}
    dashboard = ray._private.worker.get_dashboard_url()
    return services | ({"dashboard": dashboard} if dashboard else {})


def unreached(targets: Sequence[Target]) -> list[tuple[Target, str]]:
    """Those to which this process gets no TCP connection, and why."""
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        reasons = threads.map(_refusal, targets)
        return [(target, reason) for target, reason in zip(targets, reasons, strict=True) if reason]


def _refusal(target: Target) -> str:
    try:
        socket.create_connection((target.address, target.port), timeout=CONNECT_S).close()
    except OSError as error:
        return error.strerror or "no answer"
    return ""


def judge_ports(found: Sequence[tuple[Target, str]], targets: Sequence[Target]) -> Finding:
    count = len(targets)
    if not found:
        return ok(f"reaches all {count} ports of {', '.join(dict.fromkeys(target.service for target in targets))}")
    words = "; ".join(f"{target}: {reason}" for target, reason in found[:_SHOWN])
    text = f"{len(found)} of {count} ports not reached: {words}" + (" …" if len(found) > _SHOWN else "")
    if all(target.service in _FOR_PEOPLE for target, _ in found):
        return warning(text, "open them where Prometheus and people shall see the cluster (--metrics-export-port)")
    return failed(
        text,
        "let all of Ray's pods reach each other on every port (NetworkPolicy, security groups): raylets, workers and NCCL",
    )
