"""A plan for programs: plain JSON values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from unclip.planning.estimate import Step, limit_bytes
from unclip.planning.planner import Planner, Run
from unclip.planning.tables import assumptions


def as_json(planner: Planner, chosen: Run) -> dict[str, Any]:
    """What the tables show; bytes, seconds and US dollars."""
    network = planner.network
    return {
        "plan": planner.plan.to_dict(),
        "assumed": list(assumptions(planner.plan)),
        "parameters": network.parameters,
        "flops_per_sample": network.flops,
        "limit_bytes": limit_bytes(planner.plan),
        "stages": {str(stage): step and _step(step) for stage, step in planner.stages()},
        "chosen": _run(chosen),
        "curve": [_run(run) for run in planner.curve()],
    }


def _run(run: Run) -> dict[str, Any]:
    return {name: value for name, value in asdict(run).items() if name != "step"} | {"step": _step(run.step)}


def _step(step: Step) -> dict[str, Any]:
    shape, memory = step.shape, step.memory
    return {
        "workers": shape.workers,
        "microbatch": shape.microbatch,
        "accumulation": shape.accumulation,
        "seconds": step.seconds,
        "computing": step.computing,
        "communicating": step.communicating,
        "waiting": step.waiting,
        "updating": step.updating,
        "device_bytes": memory.device,
        "host_bytes": memory.host,
        "disk_bytes": memory.disk,
        "fullest": memory.moment,
    }
