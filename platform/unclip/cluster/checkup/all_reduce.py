"""All-reduce: a real process group over the links that training uses, within each node and across nodes."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch
from ray._private.state import available_resources_per_node
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import distributed

from unclip.cluster.checkup.nodes import Place, Silence, answer_of
from unclip.cluster.checkup.result import Finding, failed, ok, warning
from unclip.utils.hardware import find_gpu

ROUNDS = 8
GPU_BYTES, CPU_BYTES = 256 * 2**20, 8 * 2**20
ENOUGH, LEAST = 0.5, 0.1
"""Shares of the data sheet's rate: collectives reach 0.8 of a link; a tenth is what is left where NCCL falls back to TCP
or to the host's memory."""


@dataclass(frozen=True)
class Ring:
    """What a rank has measured. bus_bytes_s: as nccl-tests count it, 2(n-1)/n of the message a round, whatever n is."""

    ranks: int
    bus_bytes_s: float
    is_right: bool
    gpu: str


class _Rank:
    """One member of process groups, one group after the other."""

    def meet(self) -> str:
        """An address where the others find this one, free at this moment."""
        with socket.socket() as one:
            one.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{one.getsockname()[1]}"

    def reduce(self, meeting: str, rank: int, ranks: int, limit_s: float) -> Ring:
        has_gpu = torch.cuda.is_available() and bool(ray.get_gpu_ids())
        device = torch.device("cuda", 0) if has_gpu else torch.device("cpu")
        distributed.init_process_group(
            "nccl" if has_gpu else "gloo",
            init_method=meeting,
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=limit_s),
        )
        try:
            tensor = torch.full(((GPU_BYTES if has_gpu else CPU_BYTES) // 4,), float(rank + 1), device=device)
            distributed.all_reduce(tensor)  # which also sets up the links
            is_right = bool((tensor == ranks * (ranks + 1) / 2).all())
            started = time.perf_counter()
            for _ in range(ROUNDS):
                distributed.all_reduce(tensor)
            if has_gpu:
                torch.cuda.synchronize(device)
            seconds = (time.perf_counter() - started) / ROUNDS
        finally:
            distributed.destroy_process_group()
        bus = 2 * (ranks - 1) / ranks * tensor.numel() * tensor.element_size() / seconds
        return Ring(ranks, bus, is_right, torch.cuda.get_device_name(device) if has_gpu else "")


class Ranks:
    """A process for each free GPU of the cluster, or, where it has none at all, one on each node and two on a single one."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.members = [(place, self._start(place)) for place in places for _ in range(_count(place, places))]

    def _start(self, place: Place) -> Any:
        pinned = NodeAffinitySchedulingStrategy(place.id, soft=False)
        return ray.remote(_Rank).options(num_cpus=0, num_gpus=int(place.gpus >= 1), scheduling_strategy=pinned).remote()

    def end(self) -> None:
        for _, actor in self.members:
            with suppress(Exception):  # of a process that has ended
                ray.kill(actor)

    def within_nodes(self, limit_s: float) -> dict[str, Ring | Silence]:
        """By node, those with several ranks; all nodes at the same time."""
        nodes: dict[str, list[Any]] = {}
        for place, actor in self.members:
            nodes.setdefault(place.name, []).append(actor)
        started = {name: _begin(actors, limit_s) for name, actors in nodes.items() if len(actors) > 1}
        return {name: _finish(begun, limit_s) for name, begun in started.items()}

    def across_nodes(self, limit_s: float) -> Ring | Silence | None:
        """All ranks in one group; None where they are on one node."""
        if len({place.id for place, _ in self.members}) < 2:
            return None
        return _finish(_begin([actor for _, actor in self.members], limit_s), limit_s)

    def most_on_a_node(self) -> int:
        names = [place.name for place, _ in self.members]
        return max(map(names.count, names), default=0)


def _count(place: Place, places: Sequence[Place]) -> int:
    if any(other.gpus for other in places):
        return int(available_resources_per_node().get(place.id, {}).get("GPU", 0.0))
    return 2 if len(places) == 1 else 1


def _begin(actors: Sequence[Any], limit_s: float) -> list[ray.ObjectRef] | Silence:
    meeting = answer_of(actors[0].meet.remote(), limit_s)
    if isinstance(meeting, Silence):
        return meeting
    return [actor.reduce.remote(meeting, rank, len(actors), limit_s) for rank, actor in enumerate(actors)]


def _finish(begun: list[ray.ObjectRef] | Silence, limit_s: float) -> Ring | Silence:
    """The slowest rank's answer, or what the first says that failed."""
    if isinstance(begun, Silence):
        return begun
    ray.wait(begun, num_returns=len(begun), timeout=limit_s, fetch_local=False)
    answers: list[Any] = [answer_of(ref, 1.0, limit_s) for ref in begun]
    if silent := [answer for answer in answers if isinstance(answer, Silence)]:
        return silent[0]
    return min(answers, key=lambda ring: (ring.is_right, ring.bus_bytes_s))


def judge_ring(ring: Ring | Silence, *, per_node: int, nodes: int) -> Finding:
    """`per_node` ranks on each of `nodes` nodes. A known GPU's links say what to expect; of CPUs nothing is known."""
    if isinstance(ring, Silence):
        return failed(
            f"no all-reduce: {ring.reason.splitlines()[0][:300]}",
            "let the nodes reach each other on every port; NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME name the network, and "
            "NCCL_DEBUG=INFO says what NCCL tries",
        )
    if not ring.is_right:
        return failed(f"{ring.ranks} ranks got a wrong sum", "drain the nodes one by one to find the broken one")
    place = "within the node" if nodes == 1 else f"across {nodes} nodes"
    found = f"{ring.ranks} ranks {place}: {ring.bus_bytes_s / 1e9:.2f} GB/s"
    gpu = find_gpu(ring.gpu)
    if gpu is None:
        return ok(found)
    expected = gpu.node_link if nodes == 1 else per_node * gpu.cluster_link
    share = ring.bus_bytes_s / expected
    found += f", {share:.0%} of the {expected / 1e9:.0f} of a usual machine with {gpu.name}"
    if share >= ENOUGH:
        return ok(found)
    advice = (
        "see `nvidia-smi topo -m` for NVLink, and /dev/shm"
        if nodes == 1
        else "see that NCCL uses RDMA (NCCL_DEBUG=INFO names NET/IB or the plugin, not NET/Socket), on every adapter"
    )
    return warning(found, advice) if share >= LEAST else failed(found, advice)
