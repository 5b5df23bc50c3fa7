"""One rank of a few training steps in a process of its own, for the memory that they take: `benchmarks.planning` starts it.

`planning_worker.py CONFIG RANK STORE ANSWER` reads a run's configuration from the file CONFIG, meets the other ranks in the
file STORE, and writes JSON to the file ANSWER: bytes of the resident size beyond that of a process that has loaded everything
and computed a little.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from unclip.training.config import TrainConfig
from unclip.training.dry_step import empty_batch
from unclip.training.engine import Engine
from unclip.training.objectives import LossOutput
from unclip.utils.random import SampleGenerator

_STEPS = 3
_CPU = torch.device("cpu")


def main() -> None:
    config_file, rank, store, answer = sys.argv[1:]
    config = TrainConfig.load(config_file)
    world_size = config.resources.num_workers
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=world_size)
    _warm_up(config)
    Path(answer).write_text(json.dumps(measure(config)), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def measure(config: TrainConfig) -> dict[str, int]:
    """Peaks of building the engine and of steps as the loop makes them."""
    before = _resident("VmRSS")
    _reset_peak()
    objective = config.objective.build()
    parameters = sum(parameter.numel() for parameter in objective.model.parameters())
    engine = _engine(objective.model, config)
    built = _resident("VmHWM") - before
    batch = empty_batch(config, config.microbatch_size)

    def loss() -> LossOutput:
        generator = SampleGenerator.for_samples(config.seed, batch["position"])
        return objective.loss(engine.module, batch, generator)

    gc.collect()
    _reset_peak()
    for _ in range(_STEPS):
        for _ in range(config.accumulation_steps):
            engine.backward(engine.forward(loss).loss)
            objective.after_backward()
        engine.step(1e-6)
    return {"parameters": parameters, "building": built, "steps": _resident("VmHWM") - before}


def _engine(module: nn.Module, config: TrainConfig) -> Engine:
    sizes = {"microbatch_size": config.microbatch_size, "accumulation_steps": config.accumulation_steps}
    return Engine(module, config.optimizer, config.zero, **sizes, device=_CPU)


def _warm_up(config: TrainConfig) -> None:
    """Loads what the first steps of a process load: DeepSpeed, gloo's connections, and the kernels of the network itself.

    Those are no part of a step's memory: pages of the libraries' code, and code that oneDNN makes for each shape.
    """
    _run_engine(config)
    _run_network(config)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _run_engine(config: TrainConfig) -> None:
    """A step of a tiny network."""
    module = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 8))
    engine = _engine(module, config)
    dtype = next(module.parameters()).dtype

    def loss() -> LossOutput:
        return LossOutput(module(torch.ones(2, 4, 8, 8, dtype=dtype)).float().square().mean())

    for _ in range(config.accumulation_steps):
        engine.backward(engine.forward(loss).loss)
    engine.step(1e-6)


def _run_network(config: TrainConfig) -> None:
    """A forward and backward pass of the run's micro-batch, without DeepSpeed; nothing of it is kept."""
    objective = config.objective.build()
    if config.zero.precision == "bf16":
        objective.model.to(torch.bfloat16)
    batch = empty_batch(config, config.microbatch_size)
    generator = SampleGenerator.for_samples(config.seed, batch["position"])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.zero.precision == "autocast"):
        loss = objective.loss(objective.model, batch, generator).loss
    loss.backward()


def _resident(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


if __name__ == "__main__":
    main()
