"""Clients of a server over HTTP: requests that arrive over time, and how each was answered."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp
from benchmarks.engine.sides import Served

from unclip.generation.engine.request import Request

PATH = "/v1/images/generations"


@dataclass(frozen=True)
class Answer:
    """status: of HTTP. seconds: from the arrival of the request to the last byte of the answer."""

    status: int
    seconds: float


def body_of(request: Request) -> dict[str, Any]:
    """The API's request for the same picture."""
    options = request.options.to_dict()
    side = options.pop("up_to")
    return {"prompt": request.prompt, "seed": request.seed, "size": f"{side}x{side}", "options": options}


class Client:
    """Asks the server at `url`, over connections that stay."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> Self:
        self._runner = asyncio.Runner()
        self._session = self._runner.run(_session())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.run(self._session.close())
        self._runner.close()

    def one(self, request: Request) -> float:
        """Seconds of a request alone."""
        return self.arriving([request], [0.0]).seconds[0]

    def arriving(self, requests: Sequence[Request], arrivals: Sequence[float]) -> Served:
        """The requests, which arrive at `arrivals` seconds after the beginning, rising; all must be answered by pictures."""
        return self._runner.run(self._arriving(requests, arrivals))

    def hop(self, times: int) -> float:
        """Seconds of the median request that draws nothing."""

        async def ask() -> float:
            began = time.perf_counter()
            async with self._session.get(self._url + "/v1/models") as response:
                await response.read()
            return time.perf_counter() - began

        return statistics.median(self._runner.run(ask()) for _ in range(times))

    async def _arriving(self, requests: Sequence[Request], arrivals: Sequence[float]) -> Served:
        bodies = [body_of(request) for request in requests]
        began = time.perf_counter()
        asked = (self._ask(body, began + arrival) for body, arrival in zip(bodies, arrivals, strict=True))
        answers = await asyncio.gather(*asked)
        if refused := {answer.status for answer in answers} - {200}:
            raise RuntimeError(f"the server answered {refused}, not 200")
        ends = [arrival + answer.seconds for arrival, answer in zip(arrivals, answers, strict=True)]
        return Served([answer.seconds for answer in answers], max(ends) - arrivals[0])

    async def _ask(self, body: dict[str, Any], arrives: float) -> Answer:
        await asyncio.sleep(max(0.0, arrives - time.perf_counter()))
        async with self._session.post(self._url + PATH, json=body) as response:
            await response.read()
        return Answer(response.status, time.perf_counter() - arrives)


async def _session() -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=300)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600))
