"""How many workers the cluster holds: on nodes that live and will stay, beside what others use. Waits until there is room."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Self

import ray
from ray._private.state import available_resources_per_node

from unclip.cluster import autoscaler
from unclip.cluster.autoscaler import Answer, Ask, Bundle
from unclip.cluster.group import draining_nodes
from unclip.cluster.preflight import NOTHING, Demand, Node, PreflightError, explain, node_of, what_is_missing

_log = logging.getLogger(__name__)

SETTLE_S = 10.0
"""Time that what a group had reserved gets to be free again, before a smaller group takes its place."""
_LOOK_EVERY_S = 0.5
_SAY_EVERY_S = 30.0
_LOOK_FOR_MORE_S = 5.0
_ANSWER_S = 60.0
"""Time in which an autoscaler that lives has answered."""
_NEVER = "The autoscaler has no nodes for it, though nothing is in use: ask for less, or let its groups grow further"


def free_nodes(own: Mapping[str, int] | None = None, worker: Node | None = None) -> list[Node]:
    """What is free on each staying node; what `own` workers (their number by the node's id) reserve counts as free."""
    free, nodes = available_resources_per_node(), []
    for node in _staying():
        there = free.get(node["NodeID"], {})
        amount = node_of(node, there)
        if own and worker:
            count = own.get(node["NodeID"], 0)
            amount = replace(amount, cpus=amount.cpus + count * worker.cpus, gpus=amount.gpus + count * worker.gpus)
        nodes.append(amount)
    return nodes


def possible(counts: Sequence[int], demand: Demand, *, placement: str) -> list[int]:
    """Those of `counts` for which the staying nodes would hold the whole demand if nobody else used them."""
    declared = _declared()
    return [count for count in counts if _fits(count, demand, declared, placement)]


def largest_that_fits(counts: Sequence[int], demand: Demand, nodes: Sequence[Node], *, placement: str) -> int | None:
    """The first of `counts` for which `demand` with so many workers fits the nodes; None where none does."""
    return next((count for count in counts if _fits(count, demand, nodes, placement)), None)


def wait_for_room(
    counts: Sequence[int], demand: Demand, *, placement: str, wait_s: float, watch: Callable[[], None]
) -> int:
    """The largest of `counts` (most first) that the cluster holds now, waited for at most `wait_s`.

    An autoscaler is asked for what is missing. Less than what is possible is taken only when it has been all there is for
    `SETTLE_S`: a group that has just ended takes a moment to give back what it had, and nodes come one after the other.
    What validation reserves need not be free, since it may have it already. `watch` is called all the while.
    Raises `PreflightError` saying what is missing: at once where the autoscaler has no nodes for it though nothing is in
    use, else after `wait_s`.
    """
    started, said = time.monotonic(), -_SAY_EVERY_S
    settled_at, before = started, None
    fewest, beside_validation = replace(demand, workers=counts[-1]), replace(demand, validation=NOTHING)
    with Asking(counts, beside_validation, placement=placement) as asking:
        while True:
            nodes, now = free_nodes(), time.monotonic()
            declared = possible(counts, demand, placement=placement)
            at_best = [count for count in counts if count in declared or asking.may_come(count)]
            count = largest_that_fits(at_best, beside_validation, nodes, placement=placement)
            settled_at, before = (settled_at if count == before else now), count
            if count is not None and (count == at_best[0] or now - settled_at >= SETTLE_S):
                return count
            if counts[0] not in declared or now - started >= SETTLE_S:
                if (brought := asking.look()) is not None:
                    return brought
                if asking.has_been_refused and not declared:
                    if nodes == _declared():
                        raise PreflightError(f"{_missing(fewest, nodes, placement)}\n  {_NEVER}")
                    asking.begin_anew()
            waited = now - started
            if waited >= wait_s:
                text = f"Waited {waited:.0f} s for it (resources.wait_s), beside what others use"
                raise PreflightError(f"{_missing(fewest, nodes, placement)}\n  {text}{asking.in_words()}")
            if waited >= SETTLE_S and waited - said >= _SAY_EVERY_S:
                text = _missing(fewest, nodes, placement)
                _log.warning(f"waiting for room, at most {wait_s - waited:.0f} s more{asking.in_words()}: {text}")
                said = waited
            watch()
            time.sleep(_LOOK_EVERY_S)


def wait_for_nodes(demand: Demand, *, wait_s: float, watch: Callable[[], None] = lambda: None) -> None:
    """Returns at once where the living nodes would hold the demand if nobody else used them; else as `wait_for_room`."""
    if not possible((demand.workers,), demand, placement="PACK"):
        wait_for_room((demand.workers,), demand, placement="PACK", wait_s=wait_s, watch=watch)


def may_come(demand: Demand) -> bool:
    """Whether an autoscaler brings nodes for the demand; what it has begun to bring goes again unless it is asked for."""
    with Asking((demand.workers,), demand, placement="PACK") as asking:
        deadline = time.monotonic() + _ANSWER_S
        while asking.look() is None and not asking.is_coming:
            if not asking.grows or asking.has_been_refused or time.monotonic() > deadline:
                return False
            time.sleep(_LOOK_EVERY_S)
    return True


class Asking:
    """While the block runs, an autoscaler is asked for room for the largest of `counts` that it can bring.

    Where the cluster has none, nothing is asked.

    Args:
        counts: numbers of workers, most first.
        demand: what they claim beside each other, for any number of workers.
        placement: how workers are placed.
        there: workers that have their room already.
    """

    def __init__(self, counts: Sequence[int], demand: Demand, *, placement: str, there: int = 0) -> None:
        self._counts, self._demand, self._placement, self._there = counts, demand, placement, there
        self._refused: set[int] = set()
        self._ask: Ask | None = None
        self._answer: Answer = "none yet"
        self._is_done, self._look_again_at = False, 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._take_back()

    @cached_property
    def grows(self) -> bool:
        """Whether there is an autoscaler."""
        return autoscaler.grows()

    @property
    def has_been_refused(self) -> bool:
        """Whether the autoscaler can bring none of the counts, as things are."""
        return self._refused.issuperset(self._counts)

    @property
    def is_coming(self) -> bool:
        """Whether what is asked for is on its way."""
        return self._answer == "it comes"

    def may_come(self, count: int) -> bool:
        """Whether the autoscaler has not refused so many."""
        return self.grows and count not in self._refused

    def begin_anew(self) -> None:
        """What was refused is asked for again: others may use less by now."""
        self._refused.clear()

    def look(self) -> int | None:
        """Asks, or looks what has come of it: the number of workers, once their room is there; it is free then."""
        count = next((count for count in self._counts if self.may_come(count)), None)
        if count is None:
            return None
        if self._ask is None:
            self._ask = Ask(*bundles(replace(self._demand, workers=count - self._there), self._placement))
        self._answer = self._ask.answer()
        if self._answer == "impossible now":
            self._refused.add(count)
        if self._answer in ("impossible now", "it is there"):
            self._take_back()
        return count if self._answer == "it is there" else None

    def look_now_and_then(self) -> None:
        """`look` beside workers that train, every few seconds until the room is there: worker 0 sees that it is free."""
        if self._is_done or time.monotonic() < self._look_again_at:
            return
        self._look_again_at = time.monotonic() + _LOOK_FOR_MORE_S
        try:
            self._is_done = self.look() is not None
        except Exception:
            _log.warning("the autoscaler was not asked for more workers", exc_info=True)

    def in_words(self) -> str:
        """What the autoscaler says, to go on a sentence with."""
        if not self.grows:
            return ""
        coming = autoscaler.nodes_that_come()
        return f"; the autoscaler brings {coming}" if coming else "; the autoscaler was asked, and brings no nodes"

    def _take_back(self) -> None:
        if self._ask is not None:
            self._ask.take_back()
        self._ask = None


def bundles(demand: Demand, placement: str) -> tuple[list[Bundle], str]:
    """What to ask the autoscaler for, and the strategy."""
    workers = [_bundle(demand.worker, demand.labels)] * demand.workers
    beside = [_bundle(Node(1.0, 0.0), {})] * demand.data_cpus
    beside += [_bundle(demand.clip_actor, demand.labels if demand.clip_actor.gpus else {})] * demand.clip_actors
    if placement == "STRICT_SPREAD":  # what is beside the workers need not have nodes of its own
        return workers, placement
    if placement == "STRICT_PACK":
        amount = Node(demand.workers * demand.worker.cpus, demand.workers * demand.worker.gpus)
        return [_bundle(amount, demand.labels), *beside], "PACK"
    return workers + beside, placement


def _bundle(amount: Node, labels: Mapping[str, str]) -> Bundle:
    resources = {"CPU": amount.cpus, "GPU": amount.gpus}
    return Bundle({name: value for name, value in resources.items() if value}, labels)


def _missing(demand: Demand, nodes: Sequence[Node], placement: str) -> str:
    return explain(what_is_missing(demand, nodes, placement=placement) or "it has just changed", demand, nodes)


def _fits(count: int, demand: Demand, nodes: Sequence[Node], placement: str) -> bool:
    return what_is_missing(replace(demand, workers=count), nodes, placement=placement) is None


def _staying() -> list[dict[str, Any]]:
    """Ray's records of the nodes that live and are not to be taken away."""
    draining = draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]


def _declared() -> list[Node]:
    """What the staying nodes declare."""
    return [node_of(node, node["Resources"]) for node in _staying()]
