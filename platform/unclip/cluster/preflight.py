"""Whether a run fits the cluster, found out before it starts: Ray itself would wait for the resources without end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch

from unclip.cluster.session import joins_cluster, local_cpus, session
from unclip.config.resources import ResourcesConfig


class PreflightError(RuntimeError):
    """The cluster cannot hold the run; the message says what is needed, what there is, and what would fit."""


@dataclass(frozen=True)
class Node:
    """What one node declares."""

    cpus: float
    gpus: float


NOTHING = Node(0.0, 0.0)


@dataclass(frozen=True)
class Demand:
    """What a run claims at the same time: bundles of (CPUs, GPUs), each on one node."""

    workers: int
    worker: Node
    data_cpus: int
    clip_actors: int
    clip_actor: Node
    validation: Node = NOTHING

    @property
    def cpus(self) -> float:
        beside = self.data_cpus + self.clip_actors * self.clip_actor.cpus + self.validation.cpus
        return self.workers * self.worker.cpus + beside

    @property
    def gpus(self) -> float:
        return self.workers * self.worker.gpus + self.clip_actors * self.clip_actor.gpus + self.validation.gpus


def cluster_nodes() -> list[Node]:
    """The living nodes of the connected cluster."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for resources in alive]


def local_nodes() -> list[Node]:
    """What an instance on this machine would declare, without starting one."""
    return [Node(local_cpus(), torch.cuda.device_count())]


def uses_gpu(resources: ResourcesConfig, nodes: Sequence[Node]) -> bool:
    """Whether the workers train on GPUs: as configured; `auto` where `nodes` have one for each, or for the fewest."""
    if resources.use_gpu != "auto":
        return resources.use_gpu == "yes"
    fewest = resources.min_workers or resources.num_workers
    return sum(node.gpus for node in nodes) >= fewest * resources.gpus_per_worker


def demand_of(
    resources: ResourcesConfig, *, use_gpu: bool, clip_in_stream: bool = False, validation: Node = NOTHING
) -> Demand:
    """What a run claims at the same time with all its workers."""
    return Demand(
        workers=resources.num_workers,
        worker=Node(resources.cpus_per_worker, resources.gpus_per_worker if use_gpu else 0.0),
        data_cpus=resources.data_cpus,
        clip_actors=resources.clip_actors if clip_in_stream else 0,
        clip_actor=Node(0.0, resources.clip_gpus) if resources.clip_gpus else Node(1.0, 0.0),
        validation=validation,
    )


def check_resources(
    resources: ResourcesConfig,
    *,
    workers: int | None = None,
    clip_in_stream: bool = False,
    validation: Node = NOTHING,
    nodes: Sequence[Node] | None = None,
) -> None:
    """Raises `PreflightError` where `nodes`, or else the connected cluster, cannot hold workers, data stream and CLIPs.

    `workers` is the least that the run can do with; all of `resources.num_workers` by default.
    """
    nodes = cluster_nodes() if nodes is None else nodes
    use_gpu = uses_gpu(resources, nodes)
    demand = demand_of(resources, use_gpu=use_gpu, clip_in_stream=clip_in_stream, validation=validation)
    demand = replace(demand, workers=workers or resources.num_workers)
    missing = what_is_missing(demand, nodes, placement=resources.placement)
    if missing is not None:
        raise PreflightError(explain(missing, demand, nodes))


def check_without_claiming(resources: ResourcesConfig, **details: Any) -> None:
    """`check_resources` for a dry run: asks the cluster where there is one, and starts none on this machine."""
    if not joins_cluster():
        check_resources(resources, **details, nodes=local_nodes())
        return
    with session():
        check_resources(resources, **details)


def places(bundle: Node, nodes: Sequence[Node]) -> int:
    """How many of `bundle` the nodes hold, each on one of them."""
    return sum(_slots(node, bundle) for node in nodes)


def fit_makers(asked: int | None, maker: Node, nodes: Sequence[Node]) -> int:
    """How many processes of a bulk job to start: those asked for, or one for each share of a GPU, or one where they take none.

    Raises `PreflightError` where the nodes do not hold so many, or not one.
    """
    room = places(maker, nodes)
    wanted = asked or (max(room, 1) if maker.gpus else 1)
    if wanted <= room:
        return wanted
    advice = f"--set actors={room}" if room else "--set gpus_per_actor or cpus_per_actor to less"
    total, largest = _total_and_largest(nodes)
    raise PreflightError(
        f"the job does not fit the cluster: {room} of {wanted} actors find a place on a node.\n"
        f"  needed: {wanted} actors x {_words(maker)} = {wanted * maker.cpus:g} CPUs, {wanted * maker.gpus:g} GPUs\n"
        f"  there:  {_words(total)} on {len(nodes)} nodes, the largest with {_words(largest)}\n"
        f"  this would fit: {advice}; or add nodes"
    )


def what_is_missing(demand: Demand, nodes: Sequence[Node], *, placement: str = "PACK") -> str | None:
    """Why the demand does not fit the nodes, in words; None where it does."""
    if placement == "STRICT_PACK":
        demand_of_one = Node(demand.workers * demand.worker.cpus, demand.workers * demand.worker.gpus)
        if not any(_slots(node, demand_of_one) for node in nodes):
            return f"no node holds all {demand.workers} workers, as resources.placement = STRICT_PACK asks"
    slots = [_slots(node, demand.worker) for node in nodes]
    if placement == "STRICT_SPREAD":
        slots = [min(count, 1) for count in slots]
    if sum(slots) < demand.workers:
        return f"only {sum(slots)} of {demand.workers} workers find a place on a node"
    for kind in ("cpus", "gpus"):
        there = sum(getattr(node, kind) for node in nodes)
        if getattr(demand, kind) > there + 1e-6:
            return f"{getattr(demand, kind) - there:g} {kind[:-1].upper()}s are missing"
    return None


def _slots(node: Node, bundle: Node) -> int:
    """How many bundles fit a node."""
    counts = [
        int(has / needs + 1e-6) for has, needs in ((node.cpus, bundle.cpus), (node.gpus, bundle.gpus)) if needs > 0
    ]
    return min(counts)


def explain(missing: str, demand: Demand, nodes: Sequence[Node]) -> str:
    """What is needed, what there is, and what would fit, over several lines."""
    parts = [f"{demand.workers} workers x {_words(demand.worker)}", f"{demand.data_cpus} CPUs for the data stream"]
    if demand.clip_actors:
        parts.append(f"{demand.clip_actors} CLIP actors x {_words(demand.clip_actor)}")
    if demand.validation != NOTHING:
        parts.append(f"{_words(demand.validation)} for validation")
    total, largest = _total_and_largest(nodes)
    return (
        f"the run does not fit the cluster: {missing}.\n"
        f"  needed: {' + '.join(parts)} = {demand.cpus:g} CPUs, {demand.gpus:g} GPUs\n"
        f"  there:  {_words(total)} on {len(nodes)} nodes, the largest with {_words(largest)}\n"
        f"  {_advice(demand, nodes)}"
    )


def _advice(demand: Demand, nodes: Sequence[Node]) -> str:
    """Settings that fit, found by asking for fewer workers with the smallest stream."""
    if demand.worker.gpus and not any(node.gpus for node in nodes):
        return "the cluster has no GPU: add nodes that have, or set resources.use_gpu=no"
    for workers in range(demand.workers, 0, -1):
        smaller = replace(demand, workers=workers, data_cpus=1, clip_actors=min(demand.clip_actors, 1))
        if what_is_missing(smaller, nodes) is None:
            settings = [f"resources.num_workers={workers}", "resources.data_cpus=1"]
            settings += ["resources.clip_actors=1"] if demand.clip_actors else []
            return f"this would fit: {' '.join(f'--set {setting}' for setting in settings)}; or add nodes"
    return "not even one worker fits: lower resources.cpus_per_worker or resources.gpus_per_worker, or add larger nodes"


def _total_and_largest(nodes: Sequence[Node]) -> tuple[Node, Node]:
    total = Node(sum(node.cpus for node in nodes), sum(node.gpus for node in nodes))
    return total, max(nodes, key=lambda node: (node.gpus, node.cpus), default=NOTHING)


def _words(amount: Node) -> str:
    return f"{amount.cpus:g} CPUs" + (f", {amount.gpus:g} GPUs" if amount.gpus else "")
