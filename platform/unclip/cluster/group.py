"""What the driver and a group of workers tell each other beside the group's answer, through the cluster's own store."""

from __future__ import annotations

import uuid
from contextlib import suppress

import ray
from ray import PlacementGroupID
from ray.experimental import internal_kv
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group_table,
    remove_placement_group,
)


class Group:
    """One group of workers. Picklable: worker 0 has a copy of the driver's."""

    def __init__(self) -> None:
        self._key = f"unclip/group/{uuid.uuid4().hex}"

    def announce_start(self) -> None:
        """By worker 0: the workers are there."""
        placement = get_current_placement_group()
        assert placement is not None
        _put(f"{self._key}/start", placement.id.hex())

    def announce_step(self) -> None:
        """By worker 0: the first step is done."""
        _put(f"{self._key}/step", "done")

    def announce_end(self) -> None:
        """By worker 0: its part is done."""
        _put(f"{self._key}/end", "done")

    def has_started(self) -> bool:
        """Whether the workers are there."""
        return _get(f"{self._key}/start") is not None

    def has_stepped(self) -> bool:
        """Whether they have done a step."""
        return _get(f"{self._key}/step") is not None

    def has_ended(self) -> bool:
        """Whether worker 0 has done its part."""
        return _get(f"{self._key}/end") is not None

    def workers_of_nodes(self) -> dict[str, int]:
        """How many workers each node has, by the node's id. Empty before the start."""
        placement = self._placement()
        if placement is None:
            return {}
        nodes = list(placement_group_table(placement)["bundles_to_node_id"].values())
        return {node: nodes.count(node) for node in nodes if node}

    def release(self) -> None:
        """Ends what is left of the group and gives back what it had reserved, even where Ray Train's controller died."""
        with suppress(Exception):  # of a cluster that is gone
            if (placement := self._placement()) is not None:
                remove_placement_group(placement)
            for event in ("start", "step", "end"):
                internal_kv._internal_kv_del(f"{self._key}/{event}")

    def _placement(self) -> PlacementGroup | None:
        value = _get(f"{self._key}/start")
        return PlacementGroup(PlacementGroupID(bytes.fromhex(value))) if value else None


def draining_nodes() -> dict[str, int]:
    """Nodes that will be taken away, by id: the time in ms since 1970 when they will, 0 where nobody has said.

    Ray Train's own watcher of preemptions asks the same.
    """
    return dict(ray._private.state.state.get_draining_nodes())


def _put(key: str, value: str) -> None:
    internal_kv._internal_kv_put(key, value)


def _get(key: str) -> str | None:
    value = internal_kv._internal_kv_get(key)
    return value.decode() if value else None
