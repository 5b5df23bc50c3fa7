"""Six ways to serve requests that arrive over time: the engine, three kinds of closed batches, one at a time, and diffusers.

Each is driven in one thread by `serve`: it is given what has arrived, and says what is finished.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from benchmarks.engine.diffusers_loop import DiffusersLoop
from benchmarks.engine.together import together

from unclip.generation.engine.config import EngineConfig
from unclip.generation.engine.engine import Engine
from unclip.generation.engine.request import Request, Ticket
from unclip.generation.engine.route import Stages
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.pipeline import Pipeline

SideName = Literal["engine", "closed", "static", "grouped", "single", "diffusers"]


class Side(Protocol):
    """A way to serve; requests are known by their number."""

    def take(self, number: int, request: Request, arrived: float) -> None:
        """A request has arrived, at this `time.perf_counter`."""
        ...

    def work(self) -> list[int]:
        """Does some work; returns the requests that are finished by it."""
        ...

    @property
    def resting_until(self) -> float | None:
        """`time.perf_counter` before which there is nothing to do; None where there is."""
        ...


class EngineSide:
    """Requests join between two steps."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._under_way: dict[int, Ticket] = {}

    def take(self, number: int, request: Request, arrived: float) -> None:
        self._under_way[number] = self.engine.submit(request)

    def work(self) -> list[int]:
        self.engine.step()
        done = [number for number, ticket in self._under_way.items() if ticket.done()]
        for number in done:
            self._under_way.pop(number).result(0)
        return done

    @property
    def resting_until(self) -> float | None:
        return None if self._under_way else float("inf")


class _Windowed(ABC):
    """Batches of up to `size` requests, begun when they are full or `window` seconds after their first request came.

    Answers come when all of a batch is done, as batching in front of a model does it.
    """

    def __init__(self, *, size: int, window: float) -> None:
        self._size, self._window = size, window
        self._queue: deque[tuple[float, int, Request]] = deque()

    def take(self, number: int, request: Request, arrived: float) -> None:
        self._queue.append((arrived, number, request))

    @abstractmethod
    def work(self) -> list[int]: ...

    @property
    def resting_until(self) -> float | None:
        if len(self._queue) >= self._size:
            return None
        return self._queue[0][0] + self._window if self._queue else float("inf")

    def _next_batch(self) -> dict[int, Request]:
        batch = [self._queue.popleft() for _ in range(min(self._size, len(self._queue)))]
        return {number: request for _, number, request in batch}


class ClosedSide(_Windowed):
    """The engine, but nobody joins a batch that has begun: its requests still leave one by one, and its stages overlap."""

    def __init__(self, engine: Engine, *, size: int, window: float) -> None:
        super().__init__(size=size, window=window)
        self._engine = engine
        self._batch: dict[int, Ticket] = {}

    def work(self) -> list[int]:
        if not self._batch:
            self._batch = {number: self._engine.submit(request) for number, request in self._next_batch().items()}
        self._engine.step()
        if self._engine.has_work:
            return []
        done, self._batch = self._batch, {}
        return [number for number, ticket in done.items() if ticket.result(0)]

    @property
    def resting_until(self) -> float | None:
        return None if self._batch else super().resting_until


class StaticSide(_Windowed):
    """Static batches: the stages one after the other, each with the whole batch in one call."""

    def __init__(self, make: Callable[[Sequence[Request]], object], *, size: int, window: float) -> None:
        super().__init__(size=size, window=window)
        self._make = make

    def work(self) -> list[int]:
        batch = self._next_batch()
        self._make(list(batch.values()))
        return list(batch)


class SingleSide:
    """A request after the other."""

    def __init__(self, make: Callable[[Request], object]) -> None:
        self._make = make
        self._queue: deque[tuple[int, Request]] = deque()

    def take(self, number: int, request: Request, arrived: float) -> None:
        self._queue.append((number, request))

    def work(self) -> list[int]:
        number, request = self._queue.popleft()
        self._make(request)
        return [number]

    @property
    def resting_until(self) -> float | None:
        return None if self._queue else float("inf")


@dataclass(frozen=True)
class Served:
    """seconds: from each request's arrival to its end. span: from the first arrival to the last end."""

    seconds: list[float]
    span: float


def serve(side: Side, requests: Sequence[Request], arrivals: Sequence[float]) -> Served:
    """Serves `requests`, which arrive at `arrivals` seconds after the beginning, rising."""
    began, waiting = time.perf_counter(), deque(range(len(requests)))
    ended: dict[int, float] = {}
    while len(ended) < len(requests):
        now = time.perf_counter() - began
        while waiting and arrivals[waiting[0]] <= now:
            number = waiting.popleft()
            side.take(number, requests[number], began + arrivals[number])
        rest = side.resting_until
        if rest is None or rest <= time.perf_counter():
            for number in side.work():
                ended[number] = time.perf_counter() - began
            continue
        until = min(rest, began + arrivals[waiting[0]] if waiting else float("inf"))
        time.sleep(max(0.0, until - time.perf_counter()))
    seconds = [ended[number] - arrivals[number] for number in range(len(requests))]
    return Served(seconds, max(ended.values()) - arrivals[0])


def build(name: SideName, pipeline: Pipeline, config: EngineConfig, *, size: int, window: float) -> Side:
    """The side of this name."""
    match name:
        case "engine":
            return EngineSide(Engine(Stages.of(pipeline), config))
        case "closed":
            return ClosedSide(Engine(Stages.of(pipeline), config), size=size, window=window)
        case "static":
            return StaticSide(lambda batch: together(pipeline, batch), size=size, window=window)
        case "grouped":
            return StaticSide(lambda batch: _in_groups(pipeline, batch), size=size, window=window)
        case "single":
            return SingleSide(lambda request: _in_groups(pipeline, [request]))
    loop = DiffusersLoop(pipeline)
    return SingleSide(lambda request: loop(pipeline.plan(request.options)))


def _in_groups(pipeline: Pipeline, batch: Sequence[Request]) -> None:
    """A call of the pipeline for all that ask for the same."""
    groups: dict[GenerationOptions, list[Request]] = {}
    for request in batch:
        groups.setdefault(request.options, []).append(request)
    for options, alike in groups.items():
        pipeline([request.prompt or "" for request in alike], [request.seed for request in alike], options=options)
