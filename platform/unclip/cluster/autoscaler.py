"""Ray's autoscaler: whether the cluster has one, and asking it for nodes.

Nobody can read off Ray which nodes its autoscaler may add. But it answers: what it is asked for it brings, or it says in its
next round, seconds later, that no nodes it may add would hold that beside what is in use.

To ask is to create a placement group. `ray.autoscaler.sdk.request_resources` will not do: a cluster has one such request,
which Ray Data and Ray Train overwrite, it counts what others use as there, and it outlives a driver that was killed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

_FIRST_REPORT_S = 30.0
"""An autoscaler that is started with the head node has reported by then."""
_TIMEOUT_S = 10.0
_WITHOUT: set[str] = set()
"""Clusters that were waited for, and have none."""

Answer = Literal["none yet", "it comes", "impossible now", "it is there"]


@dataclass(frozen=True)
class Bundle:
    """What has to be free on one node, as Ray names resources, and Ray labels that the node must have."""

    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)


def grows() -> bool:
    """Whether an autoscaler manages the connected cluster; one that has just begun is waited for, once."""
    cluster, deadline = _gcs().cluster_id.hex(), time.monotonic() + _FIRST_REPORT_S
    while cluster not in _WITHOUT:
        status = _status()
        # An autoscaler knows nodes by their groups. Clusters without one report too, mostly of nodes that have none; only
        # KubeRay names groups in any case.
        if not any(node.ray_node_type_name for node in status.cluster_resource_state.node_states):
            return False
        if status.autoscaling_state.autoscaler_state_version:
            return True
        if time.monotonic() > deadline:
            _WITHOUT.add(cluster)
        else:
            time.sleep(0.5)
    return False


def nodes_that_come() -> str:
    """Nodes on their way, in words: `2 of train, 1 of data`; empty: none."""
    state = _status().autoscaling_state
    groups = Counter(instance.ray_node_type_name for instance in state.pending_instances)
    for request in state.pending_instance_requests:
        groups[request.ray_node_type_name] += request.count
    return ", ".join(f"{count} of {group}" for group, count in sorted(groups.items()))


class Ask:
    """A demand for room, from now until it is taken back, or the driver ends.

    Args:
        bundles: what has to be free at the same time.
        strategy: how they are placed, as Ray's placement groups call it.
    """

    def __init__(self, bundles: Sequence[Bundle], strategy: str) -> None:
        self._group = placement_group(
            [dict(bundle.resources) for bundle in bundles],
            strategy=strategy,
            bundle_label_selector=[dict(bundle.labels) for bundle in bundles],
        )
        self._asked_at: int | None = None

    def answer(self) -> Answer:
        """What has come of it; what is there stays reserved until the ask is taken back."""
        if placement_group_table(self._group)["state"] == "CREATED":
            return "it is there"
        status = _status()
        resources, autoscaling = status.cluster_resource_state, status.autoscaling_state
        if self._asked_at is None and self._is_among(resources.pending_gang_resource_requests):
            self._asked_at = resources.cluster_resource_state_version
        if self._asked_at is None or autoscaling.last_seen_cluster_resource_state_version < self._asked_at:
            return "none yet"
        is_impossible = self._is_among(autoscaling.infeasible_gang_resource_requests)
        return "impossible now" if is_impossible else "it comes"

    def take_back(self) -> None:
        """Ends the demand; nodes that nothing else needs go."""
        with suppress(Exception):  # of a cluster that is gone
            remove_placement_group(self._group)

    def _is_among(self, requests: Sequence[object]) -> bool:
        return any(str(getattr(request, "details", "")).startswith(self._group.id.hex()) for request in requests)


def _status() -> GetClusterStatusReply:
    return GetClusterStatusReply.FromString(_gcs().get_cluster_status(timeout_s=_TIMEOUT_S))


def _gcs() -> Any:
    return ray._private.worker.global_worker.gcs_client
