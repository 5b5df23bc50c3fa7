"""What worker 0 does for all: it decides what comes after a step, and keeps the run's records."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import distributed

from unclip.training.clock import Clock
from unclip.training.config import TrainConfig
from unclip.training.flops import training_flops
from unclip.training.metric_log import MetricLog
from unclip.training.optim import learning_rate_at
from unclip.training.profiling import ProfileRequests
from unclip.training.run_folder import RunFolder
from unclip.training.save_schedule import SaveSchedule
from unclip.training.signals import Signals
from unclip.utils.hardware import peak_flops

if TYPE_CHECKING:
    from unclip.training.saver import Saver

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    """What all workers do after a step. They must not differ in it, so worker 0's counts."""

    seconds: float
    """Time in the loop, which learning rate, checkpoints and the end depend on."""
    save: bool = False
    stop: bool = False
    profile_steps: int = 0
    """Steps to record a profile of, from the next one on."""

    def shared(self, device: torch.device) -> Decision:
        """Worker 0's. Collective."""
        values = torch.tensor([float(value) for value in astuple(self)], dtype=torch.float64, device=device)
        distributed.broadcast(values, src=0)
        seconds, save, stop, profile_steps = values.tolist()
        return Decision(seconds, bool(save), bool(stop), int(profile_steps))


class Lead:
    """A context manager for the time of the loop, on worker 0 only.

    Attributes:
        stop_reason: why the run was asked to end; None while it was not.
    """

    def __init__(
        self,
        config: TrainConfig,
        saver: Saver,
        schedule: SaveSchedule,
        *,
        device: torch.device,
        signals: Signals | None,
    ) -> None:
        run = RunFolder(config.run)
        self.stop_reason: str | None = None
        self._config, self._saver, self._schedule, self._signals = config, saver, schedule, signals
        self._log, self._requests = MetricLog(run), ProfileRequests(run)
        self._sample_flops = _count_flops(config)
        self._peak = peak_flops(device, config.zero.precision)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self._log)
        self._stack.enter_context(self._requests)
        return self

    def __exit__(self, *details: Any) -> None:
        self._stack.__exit__(*details)

    def decide(self, clock: Clock) -> Decision:
        """What to do after the step that `clock` has just counted."""
        for outcome in self._saver.finished():
            if outcome.error is not None:
                _logger.error("%s", outcome.error)
            self._schedule.ended(outcome, clock)
        if self._signals is not None:
            self.stop_reason = self._signals.stop_reason()
        return Decision(
            clock.seconds,
            save=self._schedule.is_due(clock),
            stop=self.stop_reason is not None,
            profile_steps=self._requests.take(),
        )

    def skipped(self, record: Mapping[str, Any]) -> None:
        """Keeps a step that changed nothing."""
        self._log.skipped(record)

    def metrics(
        self, clock: Clock, means: Mapping[str, float], shares: Mapping[str, float], *, rate: float, memory: int
    ) -> None:
        """Keeps a line of metrics: means of the window and shares of its time; `rate` is images/s, `memory` bytes."""
        config, loop = self._config, self._config.loop
        record: dict[str, Any] = {
            "step": clock.step,
            "max_steps": loop.max_steps,
            "samples_seen": clock.samples_seen,
            "seconds": round(clock.seconds, 3),
            "progress": clock.progress(loop),
            "images_per_second": round(rate, 3),
            "eta_s": round(clock.eta_s(loop), 1),
            "learning_rate": learning_rate_at(clock.step - 1, config.optimizer, clock.expected_steps(loop)),
            **means,
            "world_size": config.resources.num_workers,
            **{f"time_{name}": round(share, 4) for name, share in shares.items()},
            "memory_bytes": memory,
            "skipped_steps": clock.skipped_steps,
            "checkpoint_step": self._schedule.committed_step,
        }
        if self._sample_flops is not None:
            record["flops_per_second"] = flops = rate * self._sample_flops
            if self._peak is not None:
                record["mfu"] = round(flops / (self._peak * config.resources.num_workers), 5)
        if self._schedule.error is not None:
            record["checkpoint_error"] = self._schedule.error
        self._log.metrics(record)


def _count_flops(config: TrainConfig) -> float | None:
    """FLOPs of a sample; None where they cannot be counted, which costs the record of MFU and not the run."""
    try:
        return training_flops(config)
    except Exception as error:
        _logger.warning("FLOPs are not counted: %s: %s", type(error).__name__, error)
        return None
