"""The one training loop: every stage, any number of workers, resumable at any checkpoint. Knows no Ray and no stage."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import distributed

from unclip.training import checkpoint
from unclip.training.clock import Clock
from unclip.training.config import TrainConfig
from unclip.training.engine import Engine
from unclip.training.initialise import initialise
from unclip.training.lead import Decision, Lead
from unclip.training.objectives import LossOutput, Objective
from unclip.training.optim import learning_rate_at
from unclip.training.profiling import Profiler
from unclip.training.run_folder import RunFolder, versions
from unclip.training.save_schedule import SaveSchedule
from unclip.training.saver import Saver
from unclip.training.signals import Signals
from unclip.training.timing import PhaseTimer
from unclip.training.watchdog import Watchdog
from unclip.training.window import LogWindow
from unclip.utils.random import SampleGenerator

Batches = Iterator[dict[str, torch.Tensor]]
Tensors = dict[str, torch.Tensor]

_logger = logging.getLogger(__name__)


class TrainingDiverged(RuntimeError):
    """The gradient was not finite for `loop.max_skipped_steps` steps in a row."""


class Trainer:
    """One worker's share of a run.

    Every wait is limited by `loop.stall_limit_s`: see `Watchdog`. `signals` is asked by worker 0 only.
    """

    def __init__(self, config: TrainConfig, *, rank: int, device: torch.device, signals: Signals | None = None) -> None:
        torch.manual_seed(config.seed)  # the same initial weights on every worker
        self.config = config
        self.rank = rank
        self.world_size = config.resources.num_workers
        self.device = device
        self.run = RunFolder(config.run)
        self.clock = Clock()
        self.timer = PhaseTimer()
        limit_s = config.loop.stall_limit_s
        self.watchdog = Watchdog(self.run, rank=rank, world_size=self.world_size, limit_s=limit_s)
        with self.watchdog.waiting("the engine"):
            self.objective: Objective = config.objective.build().to(device)
            self.engine = Engine(
                self.objective.model,
                config.optimizer,
                config.zero,
                microbatch_size=config.microbatch_size,
                accumulation_steps=config.accumulation_steps,
                device=device,
            )
            self._saver = Saver(
                self.run.checkpoints_uri,
                self.engine,
                facts={"config": config.to_dict(), "versions": versions(), "seed": config.seed},
                keep_last=config.loop.keep_checkpoints,
                keep_every_steps=config.loop.keep_every_steps,
                limit_s=limit_s / 2,  # a save that hangs is given up before a worker that waits for it
            )
        self._schedule = SaveSchedule(config)
        self._signals = signals
        self._lead: Lead | None = None
        self._profiler = Profiler(self.run, rank, device)
        self._began_at: int | None = None
        self._stopped: str | None = None

    def resume(self, newest: checkpoint.Checkpoint) -> None:
        """Continues from a committed checkpoint of the run, by any number of workers at any ZeRO stage."""
        with self.watchdog.waiting(f"the state of {newest.uri}"):
            self.objective.load_state(checkpoint.load(newest, self.engine))
        self.clock = Clock(**newest.state)
        self.watchdog.step = self._began_at = self.clock.step
        self._schedule.resumed(self.clock)

    def train(self, batches: Batches) -> dict[str, Any]:
        """Takes one element of `batches`, this worker's share of a global batch, a step; returns the run's summary.

        A run that was not resumed begins with the weights of `init_from`, where that is set. When the answer is there,
        the state behind the last step is a committed checkpoint. `stopped` in it is the reason that `signals` gave, or None.

        Raises `TrainingDiverged`, and `CheckpointError` or `OSError` where the last checkpoint or the records of worker 0
        cannot be written.
        """
        try:
            if self._began_at is None and self.config.init_from is not None:
                with self.watchdog.waiting(f"the weights of {self.config.init_from}"):
                    initialise(self.engine, self.config.init_from)
            if self.rank == 0:
                with self.watchdog.waiting("the count of the model's FLOPs"):
                    self._lead = Lead(
                        self.config, self._saver, self._schedule, device=self.device, signals=self._signals
                    )
            with self._lead or nullcontext():
                self._steps(batches)
                self._commit()
        finally:
            self._profiler.end()
            self._saver.close()
            self.watchdog.close()
        return self._summary()

    def _steps(self, batches: Batches) -> None:
        loop, window = self.config.loop, LogWindow()
        self.timer = PhaseTimer()  # what came before is no part of the run's time, nor of its first line's
        mark = time.monotonic()
        while not self.clock.finished(loop) and self._stopped is None:
            self._step(batches, window)
            self._profiler.step()
            self.clock.step += 1
            self.watchdog.step = self.clock.step
            self.clock.samples_seen += loop.global_batch_size
            mark, before = time.monotonic(), mark
            decision = self._agree(mark - before)
            if not self.clock.finished(loop):  # the last state is saved in any case
                self._follow(decision)
            if self.clock.step % loop.log_every == 0:
                self._log(window)
                window = LogWindow()
        if window.steps:
            self._log(window)

    def _agree(self, seconds: float) -> Decision:
        """What all workers do after a step that took `seconds`, in the one broadcast of a step."""
        self.clock.seconds += seconds
        decision = self._lead.decide(self.clock) if self._lead else Decision(self.clock.seconds)
        if self.world_size > 1:
            with self.watchdog.waiting(f"worker 0 after step {self.clock.step}"):
                decision = decision.shared(self.device)
        self.clock.seconds = decision.seconds
        return decision

    def _follow(self, decision: Decision) -> None:
        if decision.stop:
            self._stopped = self._lead.stop_reason if self._lead else "worker 0 was asked to stop"
        elif decision.save:
            self._save()
        if decision.profile_steps:
            self._profiler.begin(step=self.clock.step + 1, steps=decision.profile_steps)

    # --- a step -------------------------------------------------------------------------------------------------------

    def _step(self, batches: Batches, window: LogWindow) -> None:
        """One optimizer step over this worker's share of the global batch."""
        number = self.clock.step + 1
        with self.timer.phase("data"), self.watchdog.waiting(f"the batch of step {number}"):
            batch = next(batches)
            batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        with self.watchdog.waiting(f"the gradients of step {number}"):
            means = self._gradients(batch)
        with self.timer.phase("optimizer"), self.watchdog.waiting(f"the update of step {number}"):
            expected = self.clock.expected_steps(self.config.loop)
            norm = self.engine.step(learning_rate_at(self.clock.step, self.config.optimizer, expected))
        with self.watchdog.waiting(f"what the others saw in step {number}"):
            seen = self._observations(batch["position"])
            if math.isfinite(norm):
                if seen:
                    self.objective.observe(seen)
                window.add(means | {"grad_norm": torch.tensor(norm, device=self.device)})
                self.clock.skipped_in_a_row = 0
            else:
                window.skip()
                self._skip(batch, means["loss"], seen)

    def _gradients(self, batch: Tensors) -> Tensors:
        """Forward and backward passes of all micro-batches; means of their metrics."""
        # Dropout inside models draws from torch's own generator; keyed so, a resumed step repeats a straight one.
        torch.manual_seed(hash((self.config.seed, self.clock.step, self.rank)))
        means: Tensors = {}
        size = self.config.microbatch_size
        for index in range(self.config.accumulation_steps):
            micro = {name: tensor[index * size : (index + 1) * size] for name, tensor in batch.items()}
            with self.timer.phase("forward"):
                output = self.engine.forward(partial(self._loss, micro))
            with self.timer.phase("backward"):
                self.engine.backward(output.loss * _one_or_nan(output.loss))
                self.objective.after_backward()
            for name, value in ({"loss": output.loss.detach()} | output.metrics).items():
                means[name] = means.get(name, 0.0) + value.float() / self.config.accumulation_steps
        return means

    def _loss(self, micro: Tensors) -> LossOutput:
        generator = SampleGenerator.for_samples(self.config.seed, micro["position"], self.device)
        return self.objective.loss(self.engine.module, micro, generator)

    def _observations(self, positions: torch.Tensor) -> Tensors:
        """What the samples of all workers have shown, in the order of the run."""
        rows = {name: self._gather(column) for name, column in self.objective.observations().items()}
        order = self._gather(positions).argsort() if rows else None
        return {name: column[order] for name, column in rows.items()}

    def _gather(self, column: torch.Tensor) -> torch.Tensor:
        """(n,) of this worker -> (world x n,) of all, by rank; as long on every worker."""
        if self.world_size == 1:
            return column
        columns = [torch.empty_like(column) for _ in range(self.world_size)]
        distributed.all_gather(columns, column.contiguous())
        return torch.cat(columns)

    def _skip(self, batch: Tensors, loss: torch.Tensor, seen: Tensors) -> None:
        """Counts and records a step without a finite gradient; raises `TrainingDiverged` after too many in a row."""
        self.clock.skipped_steps += 1
        self.clock.skipped_in_a_row += 1
        positions, ids, losses = (self._gather(column) for column in (batch["position"], batch["id"], loss.reshape(1)))
        order = positions.argsort()
        last, in_a_row = self.clock.step + 1, self.clock.skipped_in_a_row
        record = {
            "step": last,
            "ids": ids[order].tolist(),
            "positions": positions[order].tolist(),
            "worker_losses": _json_numbers(losses),
        }
        if "loss" in seen:
            record["losses"] = _json_numbers(seen["loss"])
        if self._lead is not None:
            self._lead.skipped(record)
        if in_a_row >= self.config.loop.max_skipped_steps:
            raise TrainingDiverged(
                f"no finite gradient in {in_a_row} steps in a row, {last - in_a_row + 1} to {last}: look at the records of "
                f"their batches, whose ids are in {self.run.skipped_uri}; or begin a new run with init_from={self.run.uri} and a "
                "lower optimizer.learning_rate, or with optimizer.grad_clip"
            )

    # --- checkpoints and records --------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Has the state behind the last step saved, while training goes on."""
        with (
            self.timer.phase("checkpoint"),
            self.watchdog.waiting(f"the start of the checkpoint of step {self.clock.step}"),
        ):
            self._saver.start(asdict(self.clock), objective=self.objective.state())
        self._schedule.started(self.clock)

    def _commit(self) -> None:
        """Saves the last state, if it is not what the run began with, and waits until it counts; tries twice."""
        if self.clock.step == (self._began_at or 0):
            return
        for attempts_left in (1, 0):
            self._save()
            try:
                with self.timer.phase("checkpoint"), self.watchdog.waiting(f"the checkpoint of step {self.clock.step}"):
                    self._saver.wait()
            except (checkpoint.CheckpointError, OSError) as error:
                if not attempts_left:
                    raise
                _logger.error("the last checkpoint failed, it is tried once more: %s", error)
                time.sleep(self._schedule.retry_s)
            else:
                return

    def _log(self, window: LogWindow) -> None:
        with self.timer.phase("log"), self.watchdog.waiting(f"the metrics of step {self.clock.step}"):
            means, memory = window.close(self.world_size, self.device)
        if self._lead is not None:
            rate = window.images_per_second(self.config.loop.global_batch_size)
            self._lead.metrics(self.clock, means, self.timer.window().shares, rate=rate, memory=memory)

    def _summary(self) -> dict[str, Any]:
        timing = self.timer.total()
        return asdict(self.clock) | {
            "stage": self.config.stage,
            "stopped": self._stopped,
            "world_size": self.world_size,
            "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in self.objective.model.parameters()),
            "time_s": {name: round(seconds, 3) for name, seconds in timing.seconds.items()},
            "time_shares": {name: round(share, 4) for name, share in timing.shares.items()},
        }


def _one_or_nan(loss: torch.Tensor) -> torch.Tensor:
    """1, or NaN where the loss is not finite: times that, no such loss has a finite gradient, and nobody waits to look."""
    return torch.where(loss.detach().isfinite(), 1.0, math.nan)


def _json_numbers(values: torch.Tensor) -> list[float | None]:
    """JSON knows neither NaN nor infinity."""
    return [value if math.isfinite(value) else None for value in values.tolist()]
