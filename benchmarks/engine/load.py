"""Requests of mixed steps that arrive by chance, served in several ways: images a second, and how long each waits.

`python -m benchmarks.engine.load BUNDLE` prints ratios and writes JSON to benchmarks/results. All sides have the same
requests. Arrivals are Poisson processes: with `--loads` at shares of the rate that the engine reaches when all are there at
once, the same times for all sides; with `--curve` at shares of the rate that each side reaches itself, from which follows
what each of them serves at equal p95 (`curves`). Weights, seeds and steps are the same but for diffusers' modules, see
`diffusers_loop`.
"""

from __future__ import annotations

import argparse
import datetime
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from benchmarks.common import machine, write_json
from benchmarks.engine.curves import Point, at_equal_p95
from benchmarks.engine.sides import Served, Side, SideName, build, serve

from unclip.generation.engine.config import EngineConfig
from unclip.generation.engine.request import Request
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.pipeline import Pipeline

SIDES: tuple[SideName, ...] = get_args(SideName)
LOADS = (0.5, 0.9, 1.2)
WORDS = ("cat", "dog", "house", "tree", "red heart", "bus", "apple", "star", "moon", "fish")


@dataclass(frozen=True)
class Row:
    """One side under one load; seconds from arrival to answer."""

    side: str
    load: float
    images_per_second: float
    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, side: str, load: float, served: Served) -> Row:
        p50, p95, p99 = (float(np.percentile(served.seconds, share)) for share in (50, 95, 99))
        return cls(side, load, len(served.seconds) / served.span, p50, p95, p99)


def requests_of(count: int, up_to: int, rng: random.Random) -> list[Request]:
    """Pictures with other steps, samplers and scales each, as users ask for them."""
    found = []
    for number in range(count):
        decoder = rng.choice(
            [
                {"sampler": "ddim", "num_inference_steps": 27, "guidance_scale": 1.5},
                {"sampler": "dpmsolver++", "num_inference_steps": 10, "guidance_scale": 2.0},
                {"sampler": "dpmsolver++", "num_inference_steps": 20, "guidance_scale": 1.5},
                {"sampler": "ddpm", "num_inference_steps": 50, "guidance_scale": 1.0},
            ]
        )
        prior = {"num_inference_steps": rng.choice([16, 32, 64])}
        options = GenerationOptions().merged({"up_to": up_to, "prior": prior, "decoder": decoder})
        found.append(Request(prompt=f"a {rng.choice(WORDS)}", seed=number, options=options))
    return found


def poisson(count: int, rate: float, rng: random.Random) -> list[float]:
    """Arrival times in seconds, the first at 0."""
    times = [0.0]
    while len(times) < count:
        times.append(times[-1] + rng.expovariate(rate))
    return times


def measure(
    sides: Mapping[SideName, Side],
    requests: Sequence[Request],
    seed: int,
    *,
    loads: Sequence[float] = (),
    curve: Sequence[float] = (),
) -> dict[str, Any]:
    """All sides with all requests at once, then at each load, then each at the shares `curve` of its own rate."""
    at_once = [0.0] * len(requests)
    rates = {
        name: Row.of(name, float("inf"), serve(side, requests, at_once)).images_per_second
        for name, side in sides.items()
    }
    print("all at once, images/s: " + ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items()), flush=True)

    def served(name: SideName, rate: float, load: float) -> Row:
        row = Row.of(name, load, serve(sides[name], requests, poisson(len(requests), rate, random.Random(seed))))
        print(_line(row), flush=True)
        return row

    rows = [served(name, load * rates["engine"], load) for load in loads for name in sides]
    around = {name: [served(name, share * rates[name], share) for share in curve] for name in sides}
    points: dict[str, list[Point]] = {
        name: [Point(row.images_per_second, row.p95) for row in found] for name, found in around.items()
    }
    levels = at_equal_p95(points, "engine") if curve else []
    for level in levels:
        print(level.line, flush=True)
    return {
        "saturated": rates,
        "rows": [asdict(row) for row in rows],
        "curves": {name: [asdict(row) for row in found] for name, found in around.items()},
        "at_equal_p95": [asdict(level) for level in levels],
    }


def _line(row: Row) -> str:
    return (
        f"load {row.load:4.2f}  {row.side:10}  {row.images_per_second:6.2f} images/s  "
        f"p50 {row.p50:6.2f} s  p95 {row.p95:6.2f} s  p99 {row.p99:6.2f} s"
    )


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    options = GenerationOptions(up_to=arguments.up_to)
    pipeline = Pipeline.from_bundle(arguments.bundle, options=options)
    rows = {"decoder": arguments.decoder_rows, "upsampler_256": arguments.upsampler_rows}
    config = EngineConfig.from_dict({"rows": rows})
    requests = requests_of(arguments.requests, arguments.up_to, random.Random(arguments.seed))
    sides = {
        name: build(name, pipeline, config, size=arguments.batch, window=arguments.window) for name in arguments.sides
    }
    for side in sides.values():
        serve(side, requests[:2], [0.0, 0.0])
    found = measure(sides, requests, arguments.seed, loads=arguments.loads, curve=arguments.curve)
    today = datetime.datetime.now(tz=datetime.UTC).date()
    settings = {key: value for key, value in vars(arguments).items() if key not in ("bundle", "out", "name")}
    out = Path(arguments.out) / f"{arguments.name}-{today}.json"
    write_json(out, {"machine": machine(torch.device("cpu")), "settings": settings, **found})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", help="folder or s3:// address of a bundle with a diffusion prior")
    parser.add_argument("--up-to", type=int, default=64, help="side of the pictures in pixels")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--loads", nargs="*", type=float, default=LOADS, help="shares of the engine's own rate")
    parser.add_argument("--curve", nargs="*", type=float, default=(), help="shares of each side's own rate, rising")
    parser.add_argument("--batch", type=int, default=8, help="requests of a static batch")
    parser.add_argument("--window", type=float, default=0.2, help="seconds that a static batch waits to fill up")
    parser.add_argument("--decoder-rows", type=int, default=16)
    parser.add_argument("--upsampler-rows", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--name", default="engine-load", help="of the file; the date follows")
    return parser.parse_args()


if __name__ == "__main__":
    main()
