"""A server asked for less than, as much as, and ten times what it can do: who waits how long, who is refused, what stays.

`python -m benchmarks.serving.load BUNDLE` starts the server on Ray Serve, all stages in one replica, and measures a request
at a time (unloaded), then its capacity with as many requests under way as it takes on, then users (`users.py`) who ask at
shares of it. Memory is the replica's resident size, every second. Whether all slots are free again at the end is read
from its own metrics. Results go to benchmarks/results as JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch
from benchmarks.common import machine, write_json
from benchmarks.engine.load import requests_of
from benchmarks.serving.clients import Client, body_of
from benchmarks.serving.one_process import free_port

from unclip.cluster.serve.server import ServerConfig, running
from unclip.generation.engine.request import Request

REPLICA = "ray::ServeReplica:unclip:Ingress"
BUSY = ("in_flight", "engine_waiting", "engine_running", "rows_running", "rows_waiting")
"""Gauges of what is under way, all 0 in a server that rests."""
_HANDED_ON_S = 15.0
"""Ray hands metrics on every 10 s."""


def capacity(client: Client, requests: Sequence[Request], at_once: int) -> float:
    """Pictures a second with `at_once` of them under way, from the first arrival to the last end."""
    batches = [requests[first : first + at_once] for first in range(0, len(requests), at_once)]
    spans = [client.arriving(batch, [0.0] * len(batch)).span for batch in batches]
    return len(requests) / sum(spans)


def loaded(url: str, bodies: list[dict[str, Any]], *, rate: float, seconds: float) -> list[dict[str, Any]]:
    """What users hear who ask so often."""
    command = [sys.executable, "-m", "benchmarks.serving.users", url, "--rate", str(rate), "--seconds", str(seconds)]
    done = subprocess.run(command, input=json.dumps(bodies), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the users ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(told: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of answers: how many of each status, and seconds of those that got a picture and those that were refused."""
    accepted = [row["seconds"] for row in told if row["status"] == 200]
    refused = [row["seconds"] for row in told if row["status"] in (429, 503)]
    return {
        "statuses": {str(status): count for status, count in Counter(row["status"] for row in told).items()},
        "without_retry_after": sum(row["status"] in (429, 503) and row["retry_after"] is None for row in told),
        "asked_per_second": len(told) / max(row["asked"] for row in told),
        "images_per_second": len(accepted) / max(row["asked"] + row["seconds"] for row in told),
        "accepted": percentiles(accepted),
        "refused": percentiles(refused),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{share}": float(np.percentile(seconds, share)) for share in (50, 95, 99)} if seconds else {}


@contextmanager
def memory_of(process: psutil.Process) -> Iterator[list[float]]:
    """MiB of its resident size, every second of the block."""
    sizes, over = [process.memory_info().rss / 2**20], threading.Event()

    def watch() -> None:
        while not over.wait(1.0):
            sizes.append(process.memory_info().rss / 2**20)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield sizes
    finally:
        over.set()
        thread.join()


def replica() -> psutil.Process:
    """The process that serves."""
    found = [
        process for process in psutil.process_iter(["cmdline"]) if REPLICA in " ".join(process.info["cmdline"] or ())
    ]
    if len(found) != 1:
        raise RuntimeError(f"{len(found)} processes are named {REPLICA}, not one")
    return found[0]


def busy() -> dict[str, float]:
    """`BUSY`, added up over stages, as Prometheus would read them."""
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    text = urllib.request.urlopen(url, timeout=10).read().decode()
    found = {name: re.findall(rf"^ray_unclip_serve_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE) for name in BUSY}
    return {name: sum(map(float, values)) if values else float("nan") for name, values in found.items()}


def measure(url: str, requests: Sequence[Request], arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, one after the other."""
    with Client(url) as client:
        client.arriving(requests[:2], [0.0, 0.0])
        alone = [client.one(request) for request in requests]
        rate = capacity(client, requests, arguments.pictures)
    unloaded = percentiles(alone)
    print(f"unloaded p50 {unloaded['p50']:.2f}  p95 {unloaded['p95']:.2f} s  capacity {rate:.2f} images/s", flush=True)
    bodies, rows = [body_of(request) for request in requests], []
    with memory_of(replica()) as sizes:
        for load in arguments.loads:
            first = len(sizes)
            row = summary(loaded(url, bodies, rate=load * rate, seconds=arguments.seconds))
            row |= {"load": load, "accepted_p95_share": row["accepted"]["p95"] / unloaded["p95"], "mib": sizes[first:]}
            rows.append(row)
            print(_line(row), flush=True)
    time.sleep(_HANDED_ON_S)
    left = busy()
    print(f"left over at the end: {left}", flush=True)
    return {"unloaded": unloaded, "alone": alone, "capacity": rate, "rows": rows, "left_over": left}


def _line(row: dict[str, Any]) -> str:
    refused = {share: f"{1000 * seconds:.0f} ms" for share, seconds in row["refused"].items()}
    return (
        f"load {row['load']:4.1f}  {row['statuses']}  {row['images_per_second']:.2f} images/s  accepted p95 "
        f"{row['accepted']['p95']:.2f} s = {row['accepted_p95_share']:.2f} x unloaded  refused {refused}  "
        f"{row['mib'][0]:.0f} -> {row['mib'][-1]:.0f} MiB"
    )


def main() -> None:
    arguments = _arguments()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    requests = requests_of(arguments.requests, arguments.up_to, random.Random(arguments.seed))
    tree = {"bundle": arguments.bundle, "limits": {"pictures": arguments.pictures}, "http": {"port": free_port()}}
    with running(ServerConfig.from_dict(tree)) as url:
        found = measure(url, requests, arguments)
    today = datetime.datetime.now(tz=datetime.UTC).date()
    settings = {key: value for key, value in vars(arguments).items() if key not in ("bundle", "out", "name")}
    out = Path(arguments.out) / f"{arguments.name}-{today}.json"
    write_json(out, {"machine": machine(torch.device("cpu")), "settings": settings, **found})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", help="folder or s3:// address of a bundle with a diffusion prior")
    parser.add_argument("--up-to", type=int, default=64, help="side of the pictures in pixels")
    parser.add_argument("--requests", type=int, default=24, help="different ones")
    parser.add_argument("--pictures", type=int, default=4, help="that the server takes on at once")
    parser.add_argument("--loads", nargs="+", type=float, default=[0.5, 1.0, 10.0], help="shares of the capacity")
    parser.add_argument("--seconds", type=float, default=50.0, help="of each load")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--name", default="serving-load", help="of the file; the date follows")
    return parser.parse_args()


if __name__ == "__main__":
    main()
