"""What workers send each other in a step at every ZeRO stage, and how long that takes over given links.

Collectives are those of our engine: stages 1 and 2 all-reduce buckets of gradients, each worker keeps its part, and gather the
updated weights; stage 3 gathers weights for the forward and again for the backward pass, and scatters gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unclip.planning.memory import Shape, weight_bytes
from unclip.planning.network import Network

Operation = Literal["all_reduce", "all_gather", "reduce_scatter"]


@dataclass(frozen=True)
class Collective:
    """`times` a step, one operation on tensors of `size` bytes in all."""

    operation: Operation
    what: str
    size: float
    times: int

    def sent(self, workers: int) -> float:
        """Bytes that a worker sends in a step on a ring of `workers` (Patarasu and Yuan 2009)."""
        rounds = 2 if self.operation == "all_reduce" else 1
        return self.times * rounds * self.size * (workers - 1) / workers


@dataclass(frozen=True)
class Links:
    """Bytes/s of a GPU in one direction, to those of its node and, its share of the node's adapters, beyond; and how many
    GPUs a node has.
    """

    node: float
    cluster: float
    per_node: int

    def seconds(self, collective: Collective, workers: int) -> float:
        """First within nodes, then each GPU with its share among nodes; no latency."""
        inside = min(workers, self.per_node)
        nodes = -(-workers // self.per_node)
        within = collective.sent(inside) / self.node
        share = Collective(collective.operation, collective.what, collective.size / inside, collective.times)
        return within + share.sent(nodes) / self.cluster


def step_traffic(network: Network, shape: Shape) -> list[Collective]:
    """The collectives of one optimizer step; none for one worker."""
    zero, micro = shape.zero, shape.accumulation
    if shape.workers == 1:
        return []
    flat = float(weight_bytes(zero) * network.parameters)
    low = 2.0 * network.low_parameters if zero.precision == "autocast" and zero.stage else 0.0
    if zero.stage == 0:
        return [Collective("all_reduce", "gradients", flat, 1)]
    if zero.stage < 3:
        times = 1 if zero.stage == 1 else micro
        return [Collective("all_reduce", "gradients", flat - low, times), Collective("all_gather", "weights", flat, 1)]
    return [
        Collective("all_gather", "weights", flat - low, 2 * micro),
        Collective("reduce_scatter", "gradients", flat - low, micro),
    ]
