"""From a recipe and a number of GPUs to a plan: what fits, how long it takes, what it costs, and what data it needs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from unclip.config.base import ConfigError
from unclip.planning.assumptions import PlanConfig
from unclip.planning.estimate import Step, estimate, limit_bytes
from unclip.planning.memory import Shape
from unclip.planning.network import Network, count_network
from unclip.recipes import RECIPES
from unclip.training.config import TrainConfig
from unclip.training.engine import ZeroConfig
from unclip.training.flops import with_checkpointing
from unclip.utils.hardware import GPUS

STAGES = (0, 1, 2, 3)
CURVE_GPUS = tuple(2**power for power in range(11))
_HOUR, _DAY = 3600, 86_400
_SCRATCH = "/nvme"
"""Stands for the folder that a configuration with offload to disk has to name."""


class CannotFit(ConfigError):
    """No micro-batch fits, or the run cannot be cut up so; the message says what would."""


@dataclass(frozen=True)
class Run:
    """The whole run at one step's pace."""

    step: Step
    images_per_second: float
    mfu: float
    days: float
    cost: float
    megabytes_per_second: float
    data_nodes: int


class Planner:
    """Plans of one configuration; the network is counted once."""

    def __init__(self, plan: PlanConfig) -> None:
        self.plan = plan
        self.config = _train_config(plan)
        self.batch = plan.global_batch or self.config.loop.global_batch_size
        self.max_steps = plan.steps or self.config.loop.max_steps
        self.recomputing = with_checkpointing(self.config, enabled=False) != self.config

    @cached_property
    def network(self) -> Network:
        return count_network(self.config)

    def best(self, zero: ZeroConfig, gpus: int) -> Step | None:
        """The step with the largest micro-batch that fits, or with the one that was asked for; None where it does not."""
        share = self.batch // gpus
        sizes = [size for size in range(share, 0, -1) if share % size == 0]
        if self.plan.microbatch is not None:
            sizes = [size for size in sizes if size == min(self.plan.microbatch, share)]
        return next((step for size in sizes if self.fits(step := self.step(zero, gpus, size))), None)

    def step(self, zero: ZeroConfig, gpus: int, microbatch: int) -> Step:
        """A step with that micro-batch, whether it fits or not."""
        shape = Shape(zero, gpus, microbatch, self.batch // gpus // microbatch)
        return estimate(self.network, shape, self.plan, recomputing=self.recomputing)

    def fits(self, step: Step) -> bool:
        return step.memory.total <= limit_bytes(self.plan)

    def stages(self) -> Iterator[tuple[int, Step | None]]:
        """Of every ZeRO stage that the settings allow the best step."""
        for stage in STAGES:
            if zero := _zero(self.config.zero, stage=stage):
                yield stage, self.best(zero, self.plan.gpus)

    def run(self, step: Step) -> Run:
        """The recipe's steps at this one's pace."""
        plan, gpu = self.plan, GPUS[self.plan.gpu]
        rate = step.samples / step.seconds
        seconds = self.max_steps * step.seconds
        price = gpu.price if plan.price is None else plan.price
        peak = gpu.peaks["fp32" if step.shape.zero.precision == "fp32" else "bf16"]
        return Run(
            step=step,
            images_per_second=rate,
            mfu=rate * self.network.flops / (step.shape.workers * peak),
            days=seconds / _DAY,
            cost=seconds / _HOUR * step.shape.workers * price,
            megabytes_per_second=rate * plan.record_kb / 1000,
            data_nodes=math.ceil(rate / (plan.core_images * plan.node_cores)),
        )

    def chosen(self) -> Run:
        """The plan that was asked for. Raises `CannotFit`, with what would fit."""
        self._check_divides()
        step = self.best(self.config.zero, self.plan.gpus)
        if step is None:
            raise CannotFit(self._refusal())
        return self.run(step)

    def curve(self) -> list[Run]:
        """The same run on 1 to 1,024 GPUs, where the global batch can be dealt out and fits."""
        counts = [gpus for gpus in CURVE_GPUS if self.batch % gpus == 0]
        steps = [self.best(self.config.zero, gpus) for gpus in counts]
        return [self.run(step) for step in steps if step is not None]

    def _check_divides(self) -> None:
        gpus, batch, microbatch = self.plan.gpus, self.batch, self.plan.microbatch
        if batch % gpus:
            near = [count for count in range(1, batch + 1) if batch % count == 0 and count <= gpus][-1]
            raise CannotFit(f"gpus = {gpus} do not share a global batch of {batch} evenly; {near} would")
        if microbatch is not None and (batch // gpus) % min(microbatch, batch // gpus):
            raise CannotFit(f"microbatch = {microbatch} does not divide a worker's share of {batch // gpus}")

    def _refusal(self) -> str:
        smallest = self.step(self.config.zero, self.plan.gpus, self.plan.microbatch or 1)
        parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in smallest.memory.device.items() if size > 2**27)
        ways = "; ".join(self._ways_out()) or "more or larger GPUs"
        return (
            f"{self.plan.stage} of recipe {self.plan.recipe!r} does not fit on {self.plan.gpus} {self.plan.gpu} at ZeRO stage "
            f"{self.config.zero.stage}: a micro-batch of {smallest.shape.microbatch} takes "
            f"{smallest.memory.total / 2**30:.1f} GiB ({parts}) of {limit_bytes(self.plan) / 2**30:.1f}. What would fit: {ways}"
        )

    def _ways_out(self) -> Iterator[str]:
        """The mildest changes first."""
        zero, gpus = self.config.zero, self.plan.gpus
        if self.plan.microbatch is not None:
            smaller = self._with(microbatch=None).best(zero, gpus)
            if smaller is not None:
                yield f"--microbatch {smaller.shape.microbatch}"
        for stage in range(zero.stage + 1, 4):
            higher = _zero(zero, stage=stage)
            if higher and self.best(higher, gpus):
                yield f"--zero {stage}"
                break
        if not self.recomputing and self._with(activation_checkpointing=True).best(zero, gpus):
            yield "--activation-checkpointing"
        for place in ("cpu", "nvme"):
            away = _zero(
                zero, stage=3 if place == "nvme" else max(zero.stage, 1), offload_optimizer=place, nvme_path=_SCRATCH
            )
            if away and self.best(away, gpus):
                yield f"--zero {away.stage} --offload-optimizer {place}"
                break
        for more in (count for count in CURVE_GPUS if count > gpus and self.batch % count == 0):
            if self.best(zero, more):
                yield f"--gpus {more}"
                break

    def _with(self, **changes: Any) -> Planner:
        return Planner(self.plan.model_copy(update=changes))


def _zero(zero: ZeroConfig, **changes: Any) -> ZeroConfig | None:
    """`zero` with changes; None where they do not go together."""
    try:
        return zero.merged(changes)
    except ConfigError:
        return None


def _train_config(plan: PlanConfig) -> TrainConfig:
    """The recipe with what the plan changes of it."""
    table = RECIPES[plan.stage]
    if plan.recipe not in table:
        raise ConfigError(f"recipe = {plan.recipe!r}: {plan.stage} has {', '.join(table)}")
    config = table[plan.recipe]()
    asked: dict[str, Any] = {
        "stage": plan.zero,
        "precision": plan.precision,
        "offload_optimizer": plan.offload_optimizer,
        "offload_parameters": plan.offload_parameters,
        "nvme_path": _SCRATCH if "nvme" in (plan.offload_optimizer, plan.offload_parameters) else None,
    }
    zero = {name: value for name, value in asked.items() if value is not None}
    config = config.merged({"zero": zero})
    if plan.activation_checkpointing is None:
        return config
    return with_checkpointing(config, enabled=plan.activation_checkpointing)
