"""Room: whether the cluster holds the run that is planned, with CPUs left for its data; an autoscaler is asked for it."""

from __future__ import annotations

from collections.abc import Sequence

from unclip.cluster import autoscaler, preflight
from unclip.cluster.checkup.config import CheckupConfig
from unclip.cluster.checkup.result import Finding, failed, ok
from unclip.cluster.preflight import NOTHING, Demand, Node, PreflightError
from unclip.cluster.room import wait_for_nodes
from unclip.training.config import TrainConfig


def demand_of(config: CheckupConfig, run: TrainConfig | None, nodes: Sequence[Node]) -> Demand | None:
    """What shall fit: the run, or else so many GPUs and CPUs; None where nothing was said."""
    if run is not None:
        return preflight.demand_of(
            run.resources,
            use_gpu=preflight.uses_gpu(run.resources, nodes),
            clip_in_stream=run.data.embeddings == "stream",
            validation=Node(run.validation.cpus, run.validation.gpus) if run.validation.every_steps else NOTHING,
        )
    if config.gpus:
        return Demand(config.gpus, Node(0.0, 1.0), data_cpus=config.cpus, labels=config.node_labels, who="GPUs")
    if config.cpus:
        return Demand(0, Node(1.0, 0.0), data_cpus=config.cpus, who="CPUs")
    return None


def bring_up(demand: Demand, wait_s: float) -> str:
    """Has an autoscaler bring the nodes that are missing, where there is one; why they did not come, empty where they did."""
    if preflight.what_is_missing(demand, preflight.cluster_nodes()) is None or not autoscaler.grows():
        return ""
    try:
        wait_for_nodes(demand, wait_s=wait_s)
    except PreflightError as error:
        return str(error).splitlines()[-1].strip()
    return ""


def judge_room(demand: Demand, nodes: Sequence[Node], *, placement: str, refusal: str = "") -> Finding:
    """Against all that the nodes declare, whoever uses it now. `refusal`: what the autoscaler said."""
    missing = preflight.what_is_missing(demand, nodes, placement=placement)
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    found = f"needs {demand.cpus:g} CPUs and {demand.gpus:g} GPUs, {len(nodes)} nodes have {cpus:g} and {gpus:g}"
    if missing is not None:
        advice = preflight.explain(missing, demand, nodes).splitlines()[-1].strip()
        return failed(f"{missing}: {found}", refusal or advice)
    left = cpus - demand.cpus + demand.data_cpus
    return ok(f"{found}; beside the rest {left:g} CPUs are left for data, which asks for {demand.data_cpus}")
