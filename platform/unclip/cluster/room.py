"""How many workers the cluster holds: on nodes that live and will stay, beside what others use. Waits until there is room."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray._private.state import available_resources_per_node

from unclip.cluster.group import draining_nodes
from unclip.cluster.preflight import NOTHING, Demand, Node, PreflightError, explain, what_is_missing

_log = logging.getLogger(__name__)

SETTLE_S = 10.0
"""Time that what a group had reserved gets to be free again, before a smaller group takes its place."""
_LOOK_EVERY_S = 0.5
_SAY_EVERY_S = 30.0


def free_nodes(own: Mapping[str, int] | None = None, worker: Node | None = None) -> list[Node]:
    """What is free on each staying node; what `own` workers (their number by the node's id) reserve counts as free."""
    free, nodes = available_resources_per_node(), []
    for node in _staying():
        there = free.get(node["NodeID"], {})
        cpus, gpus = there.get("CPU", 0.0), there.get("GPU", 0.0)
        if own and worker:
            count = own.get(node["NodeID"], 0)
            cpus, gpus = cpus + count * worker.cpus, gpus + count * worker.gpus
        nodes.append(Node(cpus, gpus))
    return nodes


def possible(counts: Sequence[int], demand: Demand, *, placement: str) -> list[int]:
    """Those of `counts` for which the staying nodes would hold the whole demand if nobody else used them."""
    declared = [Node(*_amounts(node["Resources"])) for node in _staying()]
    return [count for count in counts if _fits(count, demand, declared, placement)]


def largest_that_fits(counts: Sequence[int], demand: Demand, nodes: Sequence[Node], *, placement: str) -> int | None:
    """The first of `counts` for which `demand` with so many workers fits the nodes; None where none does."""
    return next((count for count in counts if _fits(count, demand, nodes, placement)), None)


def wait_for_room(
    counts: Sequence[int], demand: Demand, *, placement: str, wait_s: float, watch: Callable[[], None]
) -> int:
    """The largest of `counts` (most first) that the cluster holds now, waited for at most `wait_s`.

    Less than what is possible is taken only after `SETTLE_S`: a group that has just ended takes a moment to give back what
    it had. What validation reserves need not be free, since it may have it already. `watch` is called all the while.
    Raises `PreflightError` saying what is missing.
    """
    started, said = time.monotonic(), -_SAY_EVERY_S
    beside_validation = replace(demand, validation=NOTHING)
    while True:
        nodes, waited = free_nodes(), time.monotonic() - started
        at_best = possible(counts, demand, placement=placement)
        count = largest_that_fits(at_best, beside_validation, nodes, placement=placement)
        if count is not None and (count == at_best[0] or waited >= SETTLE_S):
            return count
        if waited >= wait_s or (waited >= SETTLE_S and waited - said >= _SAY_EVERY_S):
            fewest = replace(demand, workers=counts[-1])
            text = explain(what_is_missing(fewest, nodes, placement=placement) or "it has just changed", fewest, nodes)
            if waited >= wait_s:
                raise PreflightError(
                    f"{text}\n  Waited {waited:.0f} s for it (resources.wait_s), beside what others use"
                )
            _log.warning(f"waiting for room, at most {wait_s - waited:.0f} s more: {text}")
            said = waited
        watch()
        time.sleep(_LOOK_EVERY_S)


def _fits(count: int, demand: Demand, nodes: Sequence[Node], placement: str) -> bool:
    return what_is_missing(replace(demand, workers=count), nodes, placement=placement) is None


def _staying() -> list[dict[str, Any]]:
    """Ray's records of the nodes that live and are not to be taken away."""
    draining = draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]


def _amounts(resources: Mapping[str, float]) -> tuple[float, float]:
    return resources.get("CPU", 0.0), resources.get("GPU", 0.0)
