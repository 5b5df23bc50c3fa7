"""Four ways to serve requests that arrive over time: the engine, static batches, one at a time, and diffusers' modules.

Each is driven in one thread by `serve`: it is given what has arrived, and says what is finished.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from benchmarks.engine.diffusers_loop import DiffusersLoop

from unclip.generation.engine.config import EngineConfig
from unclip.generation.engine.engine import Engine
from unclip.generation.engine.request import Request, Ticket
from unclip.generation.engine.route import Stages
from unclip.pipelines.pipeline import Pipeline


class Side(Protocol):
    """A way to serve; requests are known by their number."""

    def take(self, number: int, request: Request) -> None:
        """A request has arrived."""
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

    def take(self, number: int, request: Request) -> None:
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


class StaticSide:
    """Batches of up to `size` requests, begun when they are full or `window` seconds after their first request came.

    A batch runs as the engine would run it: other steps, samplers and scales share forward passes, stages overlap, who is
    done leaves. But nobody joins, and answers come when all of it is done, as batching in front of a model does it.
    """

    def __init__(self, engine: Engine, *, size: int, window: float) -> None:
        self._engine, self._size, self._window = engine, size, window
        self._queue: deque[tuple[float, int, Request]] = deque()
        self._batch: dict[int, Ticket] = {}

    def take(self, number: int, request: Request) -> None:
        self._queue.append((time.perf_counter(), number, request))

    def work(self) -> list[int]:
        if not self._batch:
            for _ in range(min(self._size, len(self._queue))):
                _, number, request = self._queue.popleft()
                self._batch[number] = self._engine.submit(request)
        self._engine.step()
        if self._engine.has_work:
            return []
        done, self._batch = self._batch, {}
        return [number for number, ticket in done.items() if ticket.result(0)]

    @property
    def resting_until(self) -> float | None:
        if self._batch or len(self._queue) >= self._size:
            return None
        return self._queue[0][0] + self._window if self._queue else float("inf")


class SingleSide:
    """The pipeline, a request after the other."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._queue: deque[tuple[int, Request]] = deque()

    def take(self, number: int, request: Request) -> None:
        self._queue.append((number, request))

    def work(self) -> list[int]:
        number, request = self._queue.popleft()
        assert request.prompt is not None
        self._pipeline([request.prompt], [request.seed], options=request.options)
        return [number]

    @property
    def resting_until(self) -> float | None:
        return None if self._queue else float("inf")


class DiffusersSide:
    """diffusers' modules of the same shapes through as many steps, a request after the other, as its pipeline does it."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._loop, self._pipeline = DiffusersLoop(pipeline), pipeline
        self._queue: deque[tuple[int, Request]] = deque()

    def take(self, number: int, request: Request) -> None:
        self._queue.append((number, request))

    def work(self) -> list[int]:
        number, request = self._queue.popleft()
        self._loop(self._pipeline.plan(request.options))
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
            side.take(number, requests[number])
        rest = side.resting_until
        if rest is None or rest <= time.perf_counter():
            for number in side.work():
                ended[number] = time.perf_counter() - began
            continue
        until = min(rest, began + arrivals[waiting[0]] if waiting else float("inf"))
        time.sleep(max(0.0, until - time.perf_counter()))
    seconds = [ended[number] - arrivals[number] for number in range(len(requests))]
    return Served(seconds, max(ended.values()) - arrivals[0])


def build(name: str, pipeline: Pipeline, config: EngineConfig, *, size: int, window: float) -> Side:
    """The side of this name, warm."""
    with torch.no_grad():
        if name == "engine":
            return EngineSide(Engine(Stages.of(pipeline), config))
        if name == "static":
            return StaticSide(Engine(Stages.of(pipeline), config), size=size, window=window)
    return SingleSide(pipeline) if name == "single" else DiffusersSide(pipeline)
