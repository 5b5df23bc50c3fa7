"""What HTTP and Ray Serve add to the engine: milliseconds a request, and throughput when all are there at once.

`python -m benchmarks.serving.overhead BUNDLE` measures the same requests on the engine alone, on the app in one process
under uvicorn, and on the app behind Ray Serve, all stages in one replica each; `--sides engine_in_ray serve` compares with an
engine in a Ray actor beside the server, which Ray's own processes slow down as much. The sides take turns: in each round every
side makes some requests one after the other, then all of them at once. Each computes with `--threads` threads; what is
left of the machine speaks HTTP and plays the client. Results go to benchmarks/results as JSON.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import ray
import torch
from benchmarks.common import machine, write_json
from benchmarks.engine.load import requests_of
from benchmarks.engine.sides import Served
from benchmarks.serving.clients import Client
from benchmarks.serving.one_process import free_port, running_in_one_process

from unclip.cluster.serve.server import ServerConfig, running
from unclip.generation.engine.engine import Engine
from unclip.generation.engine.request import Request
from unclip.generation.engine.route import Stages
from unclip.generation.engine.worker import EngineThread
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.pipeline import Pipeline
from unclip.serving.config import ServeConfig

SIDES = ("engine", "app", "serve", "engine_in_ray")
_HOPS = 50


class Side(Protocol):
    """Something that draws pictures."""

    def one(self, request: Request) -> float:
        """Seconds of a request alone."""
        ...

    def arriving(self, requests: Sequence[Request], arrivals: Sequence[float]) -> Served:
        """The requests, which arrive at these seconds after the beginning, rising."""
        ...


class EngineAlone:
    """No HTTP, and nobody else."""

    def __init__(self, engine: EngineThread) -> None:
        self._engine = engine

    def one(self, request: Request) -> float:
        began = time.perf_counter()
        self._engine.submit(request).result(600)
        return time.perf_counter() - began

    def arriving(self, requests: Sequence[Request], arrivals: Sequence[float]) -> Served:
        began, tickets = time.perf_counter(), []
        for request, arrival in zip(requests, arrivals, strict=True):
            time.sleep(max(0.0, began + arrival - time.perf_counter()))
            tickets.append(self._engine.submit(request))
        results = [ticket.result(600) for ticket in tickets]
        return Served([result.seconds for result in results], time.perf_counter() - began)


class EngineInRay:
    """The engine alone in an actor of the instance that is running; seconds are those that pass there."""

    def __init__(self, config: ServeConfig, threads: int) -> None:
        self._actor = ray.remote(num_cpus=1)(_EngineActor).remote(config, threads)

    def one(self, request: Request) -> float:
        seconds: float = ray.get(self._actor.one.remote(request))
        return seconds

    def arriving(self, requests: Sequence[Request], arrivals: Sequence[float]) -> Served:
        served: Served = ray.get(self._actor.arriving.remote(requests, arrivals))
        return served


class _EngineActor(EngineAlone):
    def __init__(self, config: ServeConfig, threads: int) -> None:
        torch.set_num_threads(threads)
        super().__init__(EngineThread(_engine(config)))


def _engine(config: ServeConfig) -> Engine:
    return Engine(Stages.of(Pipeline.from_bundle(config.bundle)), config.engine)


def measure(sides: Mapping[str, Side], requests: Sequence[Request], rounds: int, alone: int) -> dict[str, Any]:
    """Each side's seconds a request alone, and pictures a second with all there at once, of all rounds."""
    at_once = [0.0] * len(requests)
    for side in sides.values():
        side.arriving(requests, at_once)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            asked = [requests[(number * alone + index) % len(requests)] for index in range(alone)]
            seconds[name].extend(side.one(request) for request in asked)
            rates[name].append(len(requests) / side.arriving(requests, at_once).span)
    return {
        name: {
            "p50_ms": 1000 * statistics.median(seconds[name]),
            "images_per_second": statistics.median(rates[name]),
            "seconds": seconds[name],
            "rates": rates[name],
        }
        for name in sides
    }


def told(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of each side but an engine what it adds to a request, and its share of the engine's throughput."""
    engine = found["engine_in_ray" if "engine_in_ray" in found else "engine"]
    return {
        name: {
            "added_ms": row["p50_ms"] - engine["p50_ms"],
            "share_of_throughput": row["images_per_second"] / engine["images_per_second"],
        }
        for name, row in found.items()
        if not name.startswith("engine")
    }


def requests_of_one_kind(count: int, up_to: int, decoder_steps: int, prior_steps: int) -> list[Request]:
    """Pictures that differ by their seeds and captions, with few steps."""
    tree = {
        "up_to": up_to,
        "prior": {"num_inference_steps": prior_steps},
        "decoder": {"num_inference_steps": decoder_steps},
    }
    options = GenerationOptions().merged(tree)
    captions = [request.prompt for request in requests_of(count, up_to, random.Random(0))]
    return [Request(prompt=caption, seed=seed, options=options) for seed, caption in enumerate(captions)]


@contextmanager
def opened(names: Sequence[str], config: ServeConfig) -> Iterator[dict[str, Side]]:
    """The sides, each at work at this many pictures at most."""
    with ExitStack() as stack:
        sides: dict[str, Side] = {}
        if "engine" in names:
            sides["engine"] = EngineAlone(stack.enter_context(EngineThread(_engine(config))))
        if "app" in names:
            url = stack.enter_context(running_in_one_process(config, threads=torch.get_num_threads()))
            sides["app"] = stack.enter_context(Client(url))
        if "serve" in names:
            server = ServerConfig.from_dict({**config.to_dict(), "http": {"port": free_port()}})
            sides["serve"] = stack.enter_context(Client(stack.enter_context(running(server))))
        if "engine_in_ray" in names:
            sides["engine_in_ray"] = EngineInRay(config, torch.get_num_threads())
        yield sides


def main() -> None:
    arguments = _arguments()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)
    requests = requests_of_one_kind(arguments.requests, arguments.up_to, arguments.decoder_steps, arguments.prior_steps)
    config = ServeConfig.from_dict({"bundle": arguments.bundle, "limits": {"pictures": 2 * arguments.requests}})
    with opened(arguments.sides, config) as sides:
        found = measure(sides, requests, arguments.rounds, arguments.alone)
        hops = {name: 1000 * side.hop(_HOPS) for name, side in sides.items() if isinstance(side, Client)}
    for name, row in found.items():
        print(f"{name:8} p50 {row['p50_ms']:8.2f} ms  {row['images_per_second']:7.2f} images/s")
    for name, row in told(found).items():
        print(f"{name:8} adds {row['added_ms']:6.2f} ms  share of throughput {row['share_of_throughput']:.3f}")
    print(f"GET /v1/models, ms: {', '.join(f'{name} {value:.2f}' for name, value in hops.items())}")
    today = datetime.datetime.now(tz=datetime.UTC).date()
    settings = {key: value for key, value in vars(arguments).items() if key not in ("bundle", "out", "name")}
    out = Path(arguments.out) / f"{arguments.name}-{today}.json"
    content = {"machine": machine(torch.device("cpu")), "settings": settings, "hops_ms": hops}
    content |= {"sides": found, "told": told(found)}
    write_json(out, content)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", help="folder or s3:// address of a bundle with a diffusion prior")
    parser.add_argument("--up-to", type=int, default=64, help="side of the pictures in pixels")
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=SIDES, help="an engine among them; engine_in_ray beside serve"
    )
    parser.add_argument("--requests", type=int, default=32, help="that are there at once")
    parser.add_argument("--alone", type=int, default=20, help="requests one after the other in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--decoder-steps", type=int, default=10)
    parser.add_argument("--prior-steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--name", default="serving-overhead", help="of the file; the date follows")
    return parser.parse_args()


if __name__ == "__main__":
    main()
