"""Whether a run fits the cluster, found out before it starts: Ray itself would wait for the resources without end.

An autoscaler may bring what is missing; whether it does is its to say when the run asks (`cluster.room`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
import torch

from unclip.cluster import autoscaler
from unclip.cluster.session import joins_cluster, local_cpus, session
from unclip.config.resources import ResourcesConfig

_log = logging.getLogger(__name__)


class PreflightError(RuntimeError):
    """The cluster cannot hold the run; the message says what is needed, what there is, and what would fit."""


@dataclass(frozen=True)
class Node:
    """What one node declares, and its Ray labels."""

    cpus: float
    gpus: float
    labels: Mapping[str, str] = field(default_factory=dict, compare=False)

    def has(self, labels: Mapping[str, str]) -> bool:
        """Whether all of these are among the node's labels."""
        return labels.items() <= self.labels.items()


NOTHING = Node(0.0, 0.0)


@dataclass(frozen=True)
class Demand:
    """What a run claims at the same time: bundles of (CPUs, GPUs), each on one node.

    Workers, and what else takes GPUs, go to nodes that have the `labels`; the rest goes anywhere.
    """

    workers: int
    worker: Node
    data_cpus: int = 0
    clip_actors: int = 0
    clip_actor: Node = NOTHING
    validation: Node = NOTHING
    labels: Mapping[str, str] = field(default_factory=dict)
    who: str = "workers"
    """What messages call the workers."""

    @property
    def cpus(self) -> float:
        beside = self.data_cpus + self.clip_actors * self.clip_actor.cpus + self.validation.cpus
        return self.workers * self.worker.cpus + beside

    @property
    def gpus(self) -> float:
        return self.workers * self.worker.gpus + self.clip_actors * self.clip_actor.gpus + self.validation.gpus


def cluster_nodes() -> list[Node]:
    """The living nodes of the connected cluster."""
    return [node_of(node, node["Resources"]) for node in ray.nodes() if node["Alive"]]


def node_of(record: Mapping[str, Any], resources: Mapping[str, float]) -> Node:
    """The node of one of Ray's records, with so much of its resources."""
    return Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0), record["Labels"])


def local_nodes() -> list[Node]:
    """What an instance on this machine would declare, without starting one."""
    return [Node(local_cpus(), torch.cuda.device_count())]


def uses_gpu(resources: ResourcesConfig, nodes: Sequence[Node]) -> bool:
    """Whether the workers train on GPUs: as configured; `auto` where `nodes` have one for each, or for the fewest."""
    if resources.use_gpu != "auto":
        return resources.use_gpu == "yes"
    fewest = resources.min_workers or resources.num_workers
    there = sum(node.gpus for node in nodes if node.has(resources.node_labels))
    return there >= fewest * resources.gpus_per_worker


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
        labels=resources.node_labels,
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

    `workers` is the least that the run can do with; all of `resources.num_workers` by default. A cluster with an
    autoscaler is not refused: what it brings is known when it is asked.
    """
    can_grow = nodes is None
    nodes = cluster_nodes() if nodes is None else nodes
    use_gpu = uses_gpu(resources, nodes)
    demand = demand_of(resources, use_gpu=use_gpu, clip_in_stream=clip_in_stream, validation=validation)
    demand = replace(demand, workers=workers or resources.num_workers)
    missing = what_is_missing(demand, nodes, placement=resources.placement)
    if missing is None:
        return
    if can_grow and autoscaler.grows():
        _log.warning(f"the nodes that are there do not hold the run yet, the autoscaler will be asked: {missing}")
        return
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


def fit_makers(asked: int | None, maker: Node, nodes: Sequence[Node], labels: Mapping[str, str]) -> int:
    """How many processes of a bulk job to start: those asked for, or one for each share of a GPU, or one where they take none.

    Raises `PreflightError` where the nodes with these labels do not hold so many, or not one.
    """
    labelled = [node for node in nodes if node.has(labels)]
    room = places(maker, labelled)
    wanted = asked or (max(room, 1) if maker.gpus else 1)
    if wanted <= room:
        return wanted
    advice = f"--set actors={room}" if room else "--set gpus_per_actor or cpus_per_actor to less"
    advice = f"this would fit: {advice}; or add nodes" if labelled else _no_such_labels(labels)
    total, largest = _total_and_largest(nodes)
    restriction = _labels_in_words("actors", labels, nodes)
    raise PreflightError(
        f"the job does not fit the cluster: {room} of {wanted} actors find a place on a node.\n"
        f"  needed: {wanted} actors x {_words(maker)} = {wanted * maker.cpus:g} CPUs, {wanted * maker.gpus:g} GPUs\n"
        f"  there:  {_words(total)} on {len(nodes)} nodes, the largest with {_words(largest)}\n"
        f"{restriction}  {advice}"
    )


def what_is_missing(demand: Demand, nodes: Sequence[Node], *, placement: str = "PACK") -> str | None:
    """Why the demand does not fit the nodes, in words; None where it does."""
    labelled = [node for node in nodes if node.has(demand.labels)]
    if placement == "STRICT_PACK":
        demand_of_one = Node(demand.workers * demand.worker.cpus, demand.workers * demand.worker.gpus)
        if not any(_slots(node, demand_of_one) for node in labelled):
            return f"no node holds all {demand.workers} workers, as resources.placement = STRICT_PACK asks"
    slots = [_slots(node, demand.worker) for node in labelled]
    if placement == "STRICT_SPREAD":
        slots = [min(count, 1) for count in slots]
    if sum(slots) < demand.workers:
        return f"only {sum(slots)} of {demand.workers} {demand.who} find a place on a node"
    for kind, usable in (("cpus", nodes), ("gpus", labelled)):
        there = sum(getattr(node, kind) for node in usable)
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
    parts = [f"{demand.workers} {demand.who} x {_words(demand.worker)}"]
    if demand.data_cpus:
        parts.append(f"{demand.data_cpus} CPUs for the data stream")
    if demand.clip_actors:
        parts.append(f"{demand.clip_actors} CLIP actors x {_words(demand.clip_actor)}")
    if demand.validation != NOTHING:
        parts.append(f"{_words(demand.validation)} for validation")
    total, largest = _total_and_largest(nodes)
    return (
        f"the run does not fit the cluster: {missing}.\n"
        f"  needed: {' + '.join(parts)} = {demand.cpus:g} CPUs, {demand.gpus:g} GPUs\n"
        f"  there:  {_words(total)} on {len(nodes)} nodes, the largest with {_words(largest)}\n"
        f"{_labels_in_words(demand.who, demand.labels, nodes)}  {_advice(demand, nodes)}"
    )


def _labels_in_words(who: str, labels: Mapping[str, str], nodes: Sequence[Node]) -> str:
    """A line on the nodes that workers may use, where not all are."""
    if not labels:
        return ""
    labelled = [node for node in nodes if node.has(labels)]
    total, _ = _total_and_largest(labelled)
    return f"          {who} use those with {_pairs(labels)} only: {_words(total)} on {len(labelled)} nodes\n"


def _no_such_labels(labels: Mapping[str, str]) -> str:
    return (
        f"no node has the labels that node_labels asks for: correct it, or start nodes with --labels={_pairs(labels)}"
    )


def _pairs(labels: Mapping[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in labels.items())


def _advice(demand: Demand, nodes: Sequence[Node]) -> str:
    """Settings that fit, found by asking for fewer workers with the smallest stream."""
    if demand.labels and not any(node.has(demand.labels) for node in nodes):
        return _no_such_labels(demand.labels)
    if demand.worker.gpus and not any(node.gpus for node in nodes if node.has(demand.labels)):
        return "the cluster has no GPU: add nodes that have, or set resources.use_gpu=no"
    if demand.who != "workers":
        return f"ask for fewer or smaller {demand.who}, or add nodes"
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
