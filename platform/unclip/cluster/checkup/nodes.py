"""The cluster's nodes, and one process on each that answers questions in time or counts as silent."""

from __future__ import annotations

import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

T = TypeVar("T")
_CALLS_AT_ONCE = 16
_START_S = 120.0
"""A process starts within seconds. A node on which it does not is lost, and not waited for by one check after the other."""


@dataclass(frozen=True)
class Place:
    """A living node. name: its host's, which is its pod's on Kubernetes. ports: of Ray's services there, by name."""

    id: str
    name: str
    address: str
    is_head: bool
    cpus: float
    gpus: float
    object_store_bytes: float
    labels: dict[str, str]
    ports: dict[str, int]


@dataclass(frozen=True)
class Silence:
    """Why a node gave no answer."""

    reason: str


_PORTS = {
    "raylet": "NodeManagerPort",
    "object manager": "ObjectManagerPort",
    "metrics": "MetricsExportPort",
}


def living_places() -> list[Place]:
    """The head first, then by name."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    hosts = Counter(node["NodeManagerHostname"] for node in alive)
    places = [_place(node, is_unique=hosts[node["NodeManagerHostname"]] == 1) for node in alive]
    return sorted(places, key=lambda place: (not place.is_head, place.name))


def _place(node: dict[str, Any], *, is_unique: bool) -> Place:
    resources, host = node["Resources"], node["NodeManagerHostname"]
    return Place(
        id=node["NodeID"],
        name=host if is_unique else f"{host}/{node['NodeID'][:6]}",
        address=node["NodeManagerAddress"],
        is_head="node:__internal_head__" in resources,
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        object_store_bytes=resources.get("object_store_memory", 0.0),
        labels=dict(node.get("Labels", {})),
        ports={name: node[field] for name, field in _PORTS.items() if node.get(field)},
    )


class Probes:
    """A process on each node for as long as the block runs. It claims nothing, so that it runs beside any work."""

    def __init__(self, places: Sequence[Place], limit_s: float) -> None:
        self.places = list(places)
        self._limit_s = limit_s
        self._actors = {place.id: _start(place) for place in places}

        self._lost: dict[str, Silence] = {}

    def __enter__(self) -> Self:
        started = {node: actor.call.remote(os.getpid) for node, actor in self._actors.items()}
        ray.wait(list(started.values()), num_returns=len(started), timeout=_START_S, fetch_local=False)
        answers = {node: answer_of(ref, 1.0, _START_S) for node, ref in started.items()}
        self._lost = {node: answer for node, answer in answers.items() if isinstance(answer, Silence)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in self._actors.values():
            ray.kill(actor)

    def ask(self, function: Callable[..., T], *arguments: Any) -> list[tuple[Place, T | Silence]]:
        """What `function(*arguments)` returns on each node, all at the same time."""
        return self.ask_each(function, {place.id: arguments for place in self.places})

    def ask_each(
        self, function: Callable[..., T], arguments: dict[str, tuple[Any, ...]]
    ) -> list[tuple[Place, T | Silence]]:
        """As `ask`, with arguments of its own for each of the nodes whose ids are there."""
        asked = [place for place in self.places if place.id in arguments]
        refs = {
            place.id: self._actors[place.id].call.remote(function, *arguments[place.id])
            for place in asked
            if place.id not in self._lost
        }
        if refs:
            ray.wait(list(refs.values()), num_returns=len(refs), timeout=self._limit_s, fetch_local=False)
        answers = self._lost | {node: answer_of(ref, 1.0, self._limit_s) for node, ref in refs.items()}
        return [(place, answers[place.id]) for place in asked]

    def ask_one(self, place: Place, function: Callable[..., T], *arguments: Any) -> T | Silence:
        """As `ask`, of one node."""
        ((_, answer),) = self.ask_each(function, {place.id: arguments})
        return answer

    def worker_port(self, place: Place) -> int | None:
        """Where the node's probe listens to other workers, one of Ray's range of worker ports; None: it did not start."""
        if place.id in self._lost:
            return None
        actor_id = self._actors[place.id]._actor_id.hex()
        return int(ray._private.state.actors(actor_id)["Address"]["Port"])


def answer_of(ref: ray.ObjectRef, wait_s: float, limit_s: float | None = None) -> Any | Silence:
    """What a call returns; `Silence` where it raised, its process died, or it takes longer than `wait_s`."""
    try:
        return ray.get(ref, timeout=wait_s)
    except ray.exceptions.GetTimeoutError:
        return Silence(f"no answer in {limit_s or wait_s:.0f} s")
    except RayTaskError as error:
        return Silence(f"{type(error.cause).__name__}: {error.cause}")
    except ray.exceptions.RayError as error:
        return Silence(f"the process there ended: {str(error).strip().splitlines()[-1]}")


def within(limit_s: float, function: Callable[[], T]) -> T:
    """What `function` returns or raises; `TimeoutError` where it takes longer, and then it is left behind."""
    ended: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue()

    def run() -> None:
        try:
            ended.put((function(), None))
        except BaseException as error:  # raised again in the thread that waits
            ended.put((None, error))

    threading.Thread(target=run, name="checkup", daemon=True).start()
    try:
        answer, error = ended.get(timeout=limit_s)
    except queue.Empty:
        raise TimeoutError(f"not done in {limit_s:.0f} s") from None
    if error is not None:
        raise error
    return answer  # type: ignore[return-value]


class _Probe:
    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


def _start(place: Place) -> Any:
    pinned = NodeAffinitySchedulingStrategy(place.id, soft=False)
    return ray.remote(_Probe).options(num_cpus=0, max_concurrency=_CALLS_AT_ONCE, scheduling_strategy=pinned).remote()
