"""The generation job against the engine alone: images a second with the same requests, on the same machine.

`python -m benchmarks.generate BUNDLE` prints ratios and writes JSON to benchmarks/results. Both sides are fresh processes with
one engine of the same settings on as many threads; they take turns. The engine alone has its requests in memory and drops
what comes out. The job reads them from a text file, goes through Ray Data, scores every picture by the bundle's CLIP, encodes
and writes it. `steady` is the rate without the first and the last tenth of the pictures, when an engine fills and empties;
`whole` is that of all of them, once the weights are loaded; `command_s` is what a process takes in all.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from benchmarks.common import machine, write_json

from unclip.generation.bulk.config import GenerateConfig

WORDS = ("cat", "dog", "house", "tree", "red heart", "bus", "apple", "star", "moon", "fish")
_TAIL = 0.1
"""Share of the pictures at either end that `steady` leaves out."""


def prompts_of(count: int) -> list[str]:
    """As different from each other as prompts of a job are: captions that repeat would be encoded once."""
    return [f"a {WORDS[number % len(WORDS)]} number {number}" for number in range(count)]


def config_of(bundle: str, folder: Path, count: int, per_unit: int) -> GenerateConfig:
    """The job's settings, with its list of prompts written; the engine alone takes the same options."""
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts_of(count)))
    return GenerateConfig.from_dict(
        {
            "bundle": bundle,
            "prompts": str(folder / "prompts.txt"),
            "out": str(folder / "out"),
            "format": "parquet",
            "prompts_per_shard": per_unit,
            "options": {"up_to": 64},
        }
    )


def engine_alone(config: GenerateConfig, count: int) -> list[tuple[float, int]]:
    """Times at which so many pictures were there; the first is the beginning."""
    from unclip.generation.device import chosen_device
    from unclip.generation.engine.engine import Engine
    from unclip.generation.engine.request import Request
    from unclip.generation.engine.route import Stages
    from unclip.generation.engine.worker import EngineThread
    from unclip.pipelines.pipeline import Pipeline

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    pipeline = Pipeline.from_bundle(config.bundle, chosen_device(config.device), options=config.options)
    done = [(time.monotonic(), 0)]
    changed = threading.Lock()

    def note(_: object) -> None:
        with changed:
            done.append((time.monotonic(), done[-1][1] + 1))

    with EngineThread(Engine(Stages.of(pipeline), config.engine)) as engine:
        requests = [Request(prompt=prompt, seed=config.seed, options=config.options) for prompt in prompts_of(count)]
        tickets = [engine.submit(request, patience=600) for request in requests]
        for ticket in tickets:
            ticket.add_done_callback(note)
        for ticket in tickets:
            ticket.result()
    return done


def whole_job(config: GenerateConfig) -> list[tuple[float, int]]:
    """As `engine_alone`, to within the second that the makers' signs take; the beginning is that of the first unit."""
    from unclip.cluster import generate
    from unclip.cluster.makers import Report

    seen: list[tuple[float, int]] = []

    class Recorded(generate.Progress):
        def show(self, report: Report) -> None:
            super().show(report)
            seen.append((time.monotonic(), self.drawn))

    generate.Progress = Recorded  # type: ignore[misc]
    generate.run_generate(config)
    now = time.time() - time.monotonic()
    written = [(path.stat().st_mtime - now, json.loads(path.read_text())) for path in Path(config.out).glob("_units/*")]
    began = min(moment - receipt["seconds"] for moment, receipt in written)
    ended = max(moment for moment, _ in written)
    drawn = [(moment, count) for moment, count in seen if count]
    return [(began, 0), *drawn[:-1], (ended, drawn[-1][1])]


def steady(done: Sequence[tuple[float, int]]) -> float:
    """Pictures a second without the first and the last ones, when the engine fills and empties."""
    times, counts = zip(*done, strict=True)
    first, last = (float(np.interp(share * counts[-1], counts, times)) for share in (_TAIL, 1 - _TAIL))
    return (1 - 2 * _TAIL) * counts[-1] / (last - first)


def whole(done: Sequence[tuple[float, int]]) -> float:
    """Pictures a second from the beginning to the end."""
    return done[-1][1] / (done[-1][0] - done[0][0])


def run_side(side: str, bundle: str, count: int, per_unit: int) -> dict[str, float]:
    """One side, in this process."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="unclip-bench-") as folder:
        config = config_of(bundle, Path(folder), count, per_unit)
        done = engine_alone(config, count) if side == "engine" else whole_job(config)
    return {"steady": steady(done), "whole": whole(done), "command_s": time.monotonic() - started}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--pictures", type=int, default=160)
    parser.add_argument("--per-unit", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--results", default="benchmarks/results")
    parser.add_argument("--side", choices=("engine", "job"), help="measure one side, and print it")
    arguments = parser.parse_args(argv)
    if arguments.side:
        print(json.dumps(run_side(arguments.side, arguments.bundle, arguments.pictures, arguments.per_unit)))
        return
    rounds = [{side: _child(side, arguments) for side in ("engine", "job")} for _ in range(arguments.rounds)]
    ratios = {
        rate: float(np.median([one["job"][rate] / one["engine"][rate] for one in rounds]))
        for rate in ("steady", "whole")
    }
    found = {
        "pictures": arguments.pictures,
        "per_unit": arguments.per_unit,
        "rounds": rounds,
        "job_over_engine": ratios,
    }
    path = Path(arguments.results) / f"generate-{datetime.date.today().isoformat()}.json"
    write_json(path, {"machine": machine(torch.device("cpu")), **found})
    print(json.dumps(found, indent=2))


def _child(side: str, arguments: argparse.Namespace) -> dict[str, float]:
    options = [f"--pictures={arguments.pictures}", f"--per-unit={arguments.per_unit}", f"--side={side}"]
    command = [sys.executable, "-m", "benchmarks.generate", arguments.bundle, *options]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    answer: dict[str, float] = json.loads(said.strip().splitlines()[-1])
    return answer


if __name__ == "__main__":
    main()
