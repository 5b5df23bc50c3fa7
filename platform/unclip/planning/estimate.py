"""How long a step takes, from its FLOPs, the bytes it moves, and the figures of a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from unclip.planning.assumptions import PlanConfig
from unclip.planning.memory import Memory, Shape, weight_bytes, worker_memory
from unclip.planning.network import Network
from unclip.planning.traffic import Links, step_traffic
from unclip.utils.hardware import GPUS, Gpu

_RECOMPUTED = 4 / 3
"""Work with activation checkpointing over work without: the forward pass again."""
_UPDATE_BYTES = 36
"""Read and written for each updated weight: gradient, weight, moments and average, all but the gradient both ways."""
_GIGA = 1e9


@dataclass(frozen=True)
class Step:
    """One optimizer step. Seconds of each part; `waiting` is communication that nothing hides."""

    shape: Shape
    memory: Memory
    computing: float
    communicating: float
    waiting: float
    updating: float

    @property
    def seconds(self) -> float:
        return self.computing + self.waiting + self.updating

    @property
    def samples(self) -> int:
        """Of all workers."""
        return self.shape.workers * self.shape.microbatch * self.shape.accumulation


def estimate(network: Network, shape: Shape, plan: PlanConfig, *, recomputing: bool) -> Step:
    """A step of `shape` on the plan's GPUs; whether it fits is for `limit_bytes` to say."""
    gpu = GPUS[plan.gpu]
    peak = gpu.peaks["fp32" if shape.zero.precision == "fp32" else "bf16"]
    work = network.flops * shape.microbatch * shape.accumulation * (_RECOMPUTED if recomputing else 1.0)
    computing = work / (peak * plan.utilization)
    wires = links(plan)
    communicating = sum(wires.seconds(each, shape.workers) for each in step_traffic(network, shape))
    hidden = plan.overlap * computing if shape.zero.stage == 3 else 0.0
    return Step(
        shape=shape,
        memory=worker_memory(network, shape),
        computing=computing,
        communicating=communicating,
        waiting=max(0.0, communicating - hidden),
        updating=_update_seconds(network, shape, plan, gpu),
    )


def limit_bytes(plan: PlanConfig) -> float:
    """What a plan may use of a GPU's memory."""
    return GPUS[plan.gpu].memory * (1 - plan.margin)


def links(plan: PlanConfig) -> Links:
    """The links of the plan's GPUs at the rate that collectives reach."""
    gpu = GPUS[plan.gpu]
    node = gpu.node_link if plan.node_link is None else plan.node_link * _GIGA
    cluster = gpu.cluster_link if plan.cluster_link is None else plan.cluster_link * _GIGA
    return Links(node * plan.link_efficiency, cluster * plan.link_efficiency, gpu.per_node)


def _update_seconds(network: Network, shape: Shape, plan: PlanConfig, gpu: Gpu) -> float:
    """The update is bound by memory, or by the way to where its state lies."""
    zero, shard = shape.zero, network.parameters / (shape.workers if shape.zero.stage else 1)
    if zero.offload_optimizer == "none":
        return _UPDATE_BYTES * shard / gpu.memory_bandwidth
    seconds = 2 * weight_bytes(zero) * shard / (plan.host_link * _GIGA)
    seconds += _UPDATE_BYTES * shard / (plan.host_memory * _GIGA)
    return seconds + (32 * shard / (plan.disk * _GIGA) if zero.offload_optimizer == "nvme" else 0.0)
