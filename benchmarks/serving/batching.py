"""The server against the same cascade behind `@serve.batch`, both by Ray Serve over HTTP: what each serves at equal p95.

`python -m benchmarks.serving.batching BUNDLE`: one after the other, each side serves the same requests of mixed steps,
samplers and scales, all at once and then as Poisson processes at shares of the rate that it reached itself
(`benchmarks.engine.load` and `curves`). Results go to benchmarks/results as JSON.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from benchmarks.common import machine, write_json
from benchmarks.engine.curves import Level, Point, at_equal_p95
from benchmarks.engine.load import Row, poisson, requests_of
from benchmarks.serving.batched import How, running_batched
from benchmarks.serving.clients import Client
from benchmarks.serving.one_process import free_port

from unclip.cluster.serve.server import ServerConfig, running
from unclip.generation.engine.request import Request

SIDES = ("unclip", "grouped", "static")


@dataclass(frozen=True)
class Curve:
    """saturated: images a second when all are there at once. rows: at shares of that."""

    saturated: float
    rows: list[Row]


def curve(client: Client, name: str, requests: list[Request], shares: list[float], seed: int) -> Curve:
    """What a side makes of the requests."""
    client.arriving(requests[:2], [0.0, 0.0])
    at_once = client.arriving(requests, [0.0] * len(requests))
    found = Curve(len(requests) / at_once.span, [])
    print(f"{name:8} all at once {found.saturated:5.2f} images/s", flush=True)
    for share in shares:
        arrivals = poisson(len(requests), share * found.saturated, random.Random(seed))
        row = Row.of(name, share, client.arriving(requests, arrivals))
        found.rows.append(row)
        times = f"p50 {row.p50:5.2f}  p95 {row.p95:5.2f} s"
        print(f"{name:8} load {share:4.2f}  {row.images_per_second:5.2f} images/s  {times}", flush=True)
    return found


def compared(curves: Mapping[str, Curve]) -> list[Level]:
    """The first side against each other one at equal p95."""
    points = {name: [Point(row.images_per_second, row.p95) for row in found.rows] for name, found in curves.items()}
    return at_equal_p95(points, next(iter(points)))


@contextmanager
def opened(name: str, arguments: argparse.Namespace) -> Iterator[Client]:
    """A side, while nothing else runs."""
    port = free_port()
    if name == "unclip":
        rows = {"decoder": arguments.decoder_rows}
        tree = {"bundle": arguments.bundle, "engine": {"rows": rows}, "http": {"port": port}}
        limits = {"pictures": 10 * arguments.requests, "timeout_s": 600.0}
        server = running(ServerConfig.from_dict({**tree, "limits": limits}))
    else:
        given = {"size": arguments.batch, "wait": arguments.wait, "threads": arguments.threads}
        server = running_batched(arguments.bundle, cast(How, name), port=port, **given)
    with server as url, Client(url) as client:
        yield client


def main() -> None:
    arguments = _arguments()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    requests = requests_of(arguments.requests, arguments.up_to, random.Random(arguments.seed))
    curves = {}
    for name in arguments.sides:
        with opened(name, arguments) as client:
            curves[name] = curve(client, name, requests, arguments.shares, arguments.seed)
    levels = compared(curves)
    for level in levels:
        print(level.line)
    today = datetime.datetime.now(tz=datetime.UTC).date()
    content = {
        "machine": machine(torch.device("cpu")),
        "settings": {key: value for key, value in vars(arguments).items() if key not in ("bundle", "out", "name")},
        "curves": {name: asdict(found) for name, found in curves.items()},
        "at_equal_p95": [asdict(level) for level in levels],
    }
    write_json(Path(arguments.out) / f"{arguments.name}-{today}.json", content)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", help="folder or s3:// address of a bundle with a diffusion prior")
    parser.add_argument("--up-to", type=int, default=64, help="side of the pictures in pixels")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.4, 0.6, 0.75, 0.9, 1.1])
    parser.add_argument("--batch", type=int, default=8, help="requests of a batch")
    parser.add_argument("--wait", type=float, default=0.1, help="seconds that a batch waits to fill up")
    parser.add_argument("--decoder-rows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--name", default="serving-batching", help="of the file; the date follows")
    return parser.parse_args()


if __name__ == "__main__":
    main()
