"""Users who ask for pictures by chance, played by locust: `python -m benchmarks.serving.users URL --rate 3 --seconds 60`.

A process of its own, since locust changes the standard library's sockets. It prints JSON: for each request, in the order of
their ends, when it was asked (seconds from the beginning), the HTTP status, how long it took, and the `retry-after` header.
"""

from __future__ import annotations

import gevent.monkey

gevent.monkey.patch_all()

import argparse  # noqa: E402
import json  # noqa: E402
import random  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from typing import Any  # noqa: E402

import gevent  # noqa: E402
from locust import FastHttpUser, task  # noqa: E402
from locust.env import Environment  # noqa: E402

PATH = "/v1/images/generations"


def play(
    url: str, bodies: list[dict[str, Any]], *, rate: float, seconds: float, users: int, seed: int
) -> list[dict[str, Any]]:
    """So many users together ask `rate` times a second, less while some of them wait for pictures.

    Each waits by chance after an answer: seen from the server requests come as a Poisson process.
    """
    rng, began, told = random.Random(seed), time.perf_counter(), []

    class Asker(FastHttpUser):
        host = url
        network_timeout = connection_timeout = 600.0
        concurrency = 1

        def wait_time(self) -> float:
            return rng.expovariate(rate / users)

        def on_start(self) -> None:
            self.has_waited = False

        @task
        def ask(self) -> None:
            if not self.has_waited:
                self.has_waited = True  # users begin with a wait, which locust ends at once when they shall stop
                return
            asked = time.perf_counter()
            with self.client.post(PATH, json=rng.choice(bodies), catch_response=True) as response:
                _ = response.content
                response.success()
            row = {"asked": asked - began, "status": response.status_code, "seconds": time.perf_counter() - asked}
            retry_after = response.headers.get("retry-after") if response.headers else None
            told.append({**row, "retry_after": retry_after})

    environment = Environment(user_classes=[Asker], stop_timeout=600.0)
    runner = environment.create_local_runner()
    runner.start(users, spawn_rate=users)
    gevent.sleep(seconds)
    runner.stop()
    runner.quit()
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--rate", type=float, required=True, help="requests a second")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--users", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args())
    print(json.dumps(play(given.pop("url"), json.load(sys.stdin), **given)))


if __name__ == "__main__":
    main()
