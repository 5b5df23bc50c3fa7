"""What worker 0 hears from the cluster while it trains: nodes that will be taken away, and room for more workers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import ray

from unclip.cluster.group import Group, draining_nodes
from unclip.cluster.preflight import NOTHING, Demand
from unclip.cluster.room import free_nodes, largest_that_fits, possible

PREEMPTION = "preemption"
RESIZE = "resize"
LOOK_EVERY_S = 0.5
ROOM_FOR_S = 5.0
"""Time that room for more workers must have been there: a resize costs a restart, and nodes come one after the other."""

_log = logging.getLogger(__name__)


class ClusterSignals:
    """Looks at the cluster in a thread of worker 0's process.

    Args:
        group: the group of workers that worker 0 belongs to.
        more: numbers of workers above the present one that the run may have, most first; empty: no growing.
        demand: what the run claims, for any number of workers.
        placement: how workers are placed, as `ResourcesConfig.placement`.
    """

    def __init__(self, group: Group, *, more: Sequence[int], demand: Demand, placement: str) -> None:
        self._group = group
        self._more = more
        self._demand = demand
        self._placement = placement
        self._reason: str | None = None
        self._own: dict[str, int] = {}
        self._stepped = threading.Event()
        self._announced = False
        self._room_since: float | None = None
        threading.Thread(target=self._watch, name="cluster-signals", daemon=True).start()

    def stop_reason(self) -> str | None:
        """Why the run should be saved and ended here, `preemption of …` or `resize to …`; None: go on. Never blocks."""
        self._stepped.set()
        return self._reason

    def _watch(self) -> None:
        silent = False
        while self._reason is None:
            time.sleep(LOOK_EVERY_S)
            try:
                self._look()
                silent = False
            except Exception:
                if not silent:  # said once for each time that the cluster is away
                    _log.warning("the cluster did not say how its nodes are", exc_info=True)
                silent = True

    def _look(self) -> None:
        self._own = self._own or self._group.workers_of_nodes()
        if self._stepped.is_set() and not self._announced:
            self._group.announce_step()
            self._announced = True
        self._reason = self._preemption() or self._resize()

    def _preemption(self) -> str | None:
        leaving = {node: deadline for node, deadline in draining_nodes().items() if node in self._own}
        if not leaving:
            return None
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        deadlines = [deadline for deadline in leaving.values() if deadline]
        left = f" in {max(0.0, min(deadlines) / 1000 - time.time()):.0f} s" if deadlines else ""
        names = ", ".join(f"{addresses.get(node, 'unknown')} ({node[:8]})" for node in leaving)
        return f"{PREEMPTION} of node {names}{left}"

    def _resize(self) -> str | None:
        """The largest number of workers that there has been room for long enough."""
        if not self._more:
            return None
        at_best = possible(self._more, self._demand, placement=self._placement)
        beside = replace(self._demand, data_cpus=0, clip_actors=0, validation=NOTHING)  # these run already
        nodes = free_nodes(self._own, self._demand.worker)
        count = largest_that_fits(at_best, beside, nodes, placement=self._placement)
        if count is None:
            self._room_since = None
            return None
        self._room_since = self._room_since or time.monotonic()
        return f"{RESIZE} to {count} workers" if time.monotonic() - self._room_since >= ROOM_FOR_S else None
