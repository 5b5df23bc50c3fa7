"""The planner's memory against what steps take: `python -m benchmarks.planning`.

Every cell is a run of a small network at one ZeRO stage, its workers processes of their own on this machine's CPUs, with
gloo between them. Measured is the highest resident size of three steps beyond that of a process that has loaded everything
(`planning_worker.py`); predicted is `worker_memory(…, lazy=True)`. glibc gives freed tensors back at once
(MALLOC_MMAP_THRESHOLD_), as its holes are not what is to be predicted. FLOPs are counted again while real steps run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import flops, machine, version, write_json

from unclip.planning.memory import Shape, worker_memory
from unclip.planning.network import count_network
from unclip.recipes import RECIPES
from unclip.training.config import TrainConfig
from unclip.training.dry_step import empty_batch
from unclip.training.flops import training_flops
from unclip.utils.random import SampleGenerator

ROOT = Path(__file__).parents[1]
_LIMIT_S = 300


@dataclass(frozen=True)
class Cell:
    """One run: a network of `networks()`, ZeRO's settings, workers, and how a step is cut up."""

    network: str
    stage: int
    precision: str = "fp32"
    workers: int = 1
    microbatch: int = 1
    accumulation: int = 1
    offload: str = "none"

    def config(self) -> TrainConfig:
        run = networks()[self.network]
        return run.merged(
            {
                "zero": {"stage": self.stage, "precision": self.precision, "offload_optimizer": self.offload},
                "loop": {
                    "global_batch_size": self.microbatch * self.accumulation * self.workers,
                    "microbatch_size": self.microbatch,
                },
                "resources": {"num_workers": self.workers},
            }
        )


def networks() -> dict[str, TrainConfig]:
    """A prior of 51M parameters, whose state is most of its memory; the demo's decoder of 9M, whose activations are."""
    prior = RECIPES["prior"]["demo"]()
    shape = {"context_length": 64, "width": 512, "depth": 8, "heads": 8}
    return {
        "prior": prior.merged({"objective": {"stage": {"model": shape}}}),
        "decoder": RECIPES["decoder"]["demo"](),
        "tiny": prior.merged({"objective": {"stage": {"model": shape | {"width": 256, "depth": 4}}}}),
    }


def cells() -> list[Cell]:
    """All that is measured by default: every stage in every float type, alone and in pairs, and offload to host memory."""
    grid = [
        Cell("prior", stage, precision, workers)
        for workers in (1, 2)
        for precision in ("fp32", "autocast", "bf16")
        for stage in range(4)
        if not (precision == "bf16" and stage == 0)
    ]
    grid += [
        Cell("decoder", stage, precision, microbatch=48) for precision in ("fp32", "autocast") for stage in range(4)
    ]
    grid += [Cell("prior", stage, "autocast", microbatch=4, accumulation=2) for stage in (0, 1, 2, 3)]
    grid += [Cell("prior", stage, "fp32", workers, offload="cpu") for workers in (1, 2) for stage in (1, 2, 3)]
    return grid + [Cell("prior", 2, precision, accumulation=2, offload="cpu") for precision in ("fp32", "bf16")]


def predicted(cell: Cell) -> int:
    """Bytes of one worker."""
    config = cell.config()
    shape = Shape(config.zero, cell.workers, cell.microbatch, cell.accumulation)
    return round(worker_memory(count_network(config), shape, lazy=True).total)


def measured(cell: Cell) -> int:
    """Bytes of the largest worker."""
    config = cell.config()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "config.json"
        file.write_text(config.to_json(), encoding="utf-8")
        ranks = [_start(file, rank, folder) for rank in range(cell.workers)]
        for rank in ranks:
            output, _ = rank.communicate(timeout=_LIMIT_S)
            if rank.returncode:
                raise RuntimeError(f"{cell} failed:\n{output[-2000:]}")
        answers = [json.loads((folder / f"answer-{rank}.json").read_text()) for rank in range(cell.workers)]
    return max(answer["steps"] for answer in answers)


def _start(config: Path, rank: int, folder: Path) -> subprocess.Popen[str]:
    settings = {
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": str(256 * 1024),
        "GLOO_SOCKET_IFNAME": "lo",
        "DS_ACCELERATOR": "cpu",
        "LOCAL_RANK": str(rank),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)]),
    }
    places = [str(config), str(rank), str(folder / "store"), str(folder / f"answer-{rank}.json")]
    command = [sys.executable, "-m", "benchmarks.planning_worker", *places]
    environment = os.environ | settings
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def flops_row(name: str) -> dict[str, Any]:
    """FLOPs of a sample: predicted, counted while a real step ran, and by the profiler, which does not know every operation."""
    config, samples = networks()[name].merged({"zero": {"precision": "fp32"}}), 2
    objective = config.objective.build()
    batch = empty_batch(config, samples)
    generator = SampleGenerator.for_samples(0, batch["position"])

    def step() -> None:
        objective.loss(objective.model, batch, generator).loss.backward()

    with torch.profiler.profile(with_flops=True) as profile:
        step()
    profiled = sum(event.flops for event in profile.key_averages())
    counted = flops(step)
    predicted_flops = training_flops(config)
    return {
        "network": name,
        "predicted": predicted_flops,
        "counted": counted / samples,
        "profiled": profiled / samples,
        "counted_ratio": counted / samples / predicted_flops,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("runs/benchmarks"), help="folder of the JSON file")
    folder: Path = parser.parse_args().results
    today = datetime.datetime.now(datetime.UTC)
    file = folder / f"planning-memory-{today:%Y-%m-%d}.json"
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else _new(today)
    known = [{name: row[name] for name in asdict(cells()[0])} for row in content["cells"]]
    for cell in cells():
        if asdict(cell) in known:  # of a run that was stopped
            continue
        row = asdict(cell) | {"predicted": predicted(cell), "measured": measured(cell)}
        row["ratio"] = round(row["predicted"] / row["measured"], 4)
        content["cells"].append(row)
        print(json.dumps(row), flush=True)
        write_json(file, content)


def _new(today: datetime.datetime) -> dict[str, Any]:
    return {
        "date": today.isoformat(timespec="seconds"),
        "machine": machine(torch.device("cpu")),
        "deepspeed": version("deepspeed"),
        "flops": [flops_row(name) for name in ("prior", "decoder")],
        "cells": [],
    }


if __name__ == "__main__":
    main()
