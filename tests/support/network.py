"""NetworkPolicies as Kubernetes reads them: whether one pod reaches another, or an address outside, at a port."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.support.manifests import NAMESPACE, Object, Pod, selects


@dataclass(frozen=True)
class Place:
    """One end of a connection."""

    labels: Mapping[str, str] = field(default_factory=dict)
    """Of the pod."""
    namespace: str | None = NAMESPACE
    """Of the pod; null for what is outside of the cluster."""
    namespace_labels: Mapping[str, str] = field(default_factory=dict)
    """Beside the name, which Kubernetes adds."""
    address: str | None = None
    """Outside of the cluster."""
    ports: Mapping[str, int] = field(default_factory=dict)
    """By name, as policies may give them."""

    @classmethod
    def of(cls, pod: Pod) -> Place:
        """A pod of the namespace."""
        ports = [port for container in pod.spec["containers"] for port in container.get("ports", [])]
        return cls(pod.labels, ports={port["name"]: port["containerPort"] for port in ports if "name" in port})


def may_reach(policies: Sequence[Object], source: Place, target: Place, port: int, protocol: str = "TCP") -> bool:
    """Whether `policies`, all of them of our namespace, let `source` open a connection to `target`."""
    return _lets(policies, "Egress", source, target, port, target, protocol) and _lets(
        policies, "Ingress", target, source, port, target, protocol
    )


def _lets(
    policies: Sequence[Object], way: str, owner: Place, other: Place, port: int, target: Place, protocol: str
) -> bool:
    """Policies of one direction allow what any of them does, and everything where none selects the pod."""
    if owner.namespace != NAMESPACE:
        return True
    rules = [
        found["spec"].get(way.lower(), [])
        for found in policies
        if way in found["spec"]["policyTypes"] and selects(found["spec"]["podSelector"], owner.labels)
    ]
    peers = "from" if way == "Ingress" else "to"
    return not rules or any(
        _peer(rule.get(peers), other) and _port(rule.get("ports"), port, target, protocol)
        for of_policy in rules
        for rule in of_policy
    )


def _peer(peers: Sequence[Mapping[str, Any]] | None, other: Place) -> bool:
    return not peers or any(_matches(peer, other) for peer in peers)


def _matches(peer: Mapping[str, Any], other: Place) -> bool:
    if "ipBlock" in peer:
        block = peer["ipBlock"]
        inside = [ipaddress.ip_network(text) for text in (block["cidr"], *block.get("except", []))]
        address = other.address and ipaddress.ip_address(other.address)
        return bool(address) and address in inside[0] and not any(address in network for network in inside[1:])
    if other.namespace is None:
        return False
    labels = {"kubernetes.io/metadata.name": other.namespace, **other.namespace_labels}
    in_namespace = selects(peer["namespaceSelector"], labels) if "namespaceSelector" in peer else _is_ours(other)
    return in_namespace and selects(peer.get("podSelector", {}), other.labels)


def _is_ours(place: Place) -> bool:
    return place.namespace == NAMESPACE


def _port(ports: Sequence[Mapping[str, Any]] | None, port: int, target: Place, protocol: str) -> bool:
    return not ports or any(
        found.get("protocol", "TCP") == protocol
        and (
            "port" not in found
            or _number(found["port"], target) <= port <= found.get("endPort", _number(found["port"], target))
        )
        for found in ports
    )


def _number(port: int | str, target: Place) -> int:
    return target.ports.get(port, -1) if isinstance(port, str) else port
