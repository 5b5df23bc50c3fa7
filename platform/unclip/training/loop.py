"""The one training loop: every stage, any number of workers, resumable at any checkpoint. Knows no Ray and no stage."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import distributed

from unclip.training import checkpoint
from unclip.training.config import TrainConfig
from unclip.training.engine import Engine
from unclip.training.objectives import LossOutput, Objective
from unclip.training.optim import learning_rate_at
from unclip.training.run_folder import RunFolder
from unclip.training.timing import PhaseTimer
from unclip.utils.random import SampleGenerator

MAX_SKIPPED_STEPS = 10
"""Optimizer steps in a row without a finite gradient, which change nothing, before the run ends with an error."""

Batches = Iterator[dict[str, torch.Tensor]]


class TrainingDiverged(RuntimeError):
    """The gradient was not finite for `MAX_SKIPPED_STEPS` steps in a row."""


@dataclass
class Clock:
    """Counts what a run has done; the part of its state that is not tensors."""

    step: int = 0
    samples_seen: int = 0
    seconds: float = 0.0
    """Time in the loop, over all restarts."""


class Trainer:
    """One worker's share of a run."""

    def __init__(self, config: TrainConfig, *, rank: int, device: torch.device) -> None:
        torch.manual_seed(config.seed)  # the same initial weights on every worker
        self.config = config
        self.rank = rank
        self.world_size = config.resources.num_workers
        self.device = device
        self.run = RunFolder(config.run)
        self.objective: Objective = config.objective.build().to(device)
        self.engine = Engine(
            self.objective.model,
            config.optimizer,
            config.zero,
            microbatch_size=config.microbatch_size,
            accumulation_steps=config.accumulation_steps,
            device=device,
        )
        self.timer = PhaseTimer()
        self.clock = Clock()
        self._skipped = 0
        self._saved_step = 0
        self._saved_seconds = 0.0

    def resume(self, newest: checkpoint.Checkpoint) -> None:
        """Continues from a committed checkpoint of the run, by any number of workers at any ZeRO stage."""
        self.objective.load_state(checkpoint.load(newest, self.engine))
        self.clock = Clock(**newest.state)
        self._saved_step, self._saved_seconds = self.clock.step, self.clock.seconds

    def train(self, batches: Batches) -> dict[str, Any]:
        """Takes one element of `batches`, this worker's share of a global batch, a step; returns the run's summary."""
        window = _Window()
        while not self._finished():
            started = time.monotonic()
            window.add(self._step(batches))
            self.clock.seconds = self._agree(self.clock.seconds + time.monotonic() - started)
            self.clock.step += 1
            self.clock.samples_seen += self.config.loop.global_batch_size
            self._save_if_due()
            if self.clock.step % self.config.loop.log_every == 0:
                with self.timer.phase("log"):
                    self._log(window)
                window = _Window()
        if window.steps:
            self._log(window)
        if self._saved_step != self.clock.step:
            self._save()
        return self._summary()

    def _step(self, batches: Batches) -> dict[str, torch.Tensor]:
        """One optimizer step over this worker's share of the global batch; means of its metrics."""
        with self.timer.phase("data"):
            batch = next(batches)
            batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        # Dropout inside models draws from torch's own generator; keyed so, a resumed step repeats a straight one.
        torch.manual_seed(hash((self.config.seed, self.clock.step, self.rank)))
        sums: dict[str, torch.Tensor] = {}
        size = self.config.microbatch_size
        for index in range(self.config.accumulation_steps):
            micro = {name: tensor[index * size : (index + 1) * size] for name, tensor in batch.items()}
            with self.timer.phase("forward"):
                output = self.engine.forward(partial(self._loss, micro))
            with self.timer.phase("backward"):
                self.engine.backward(output.loss)
                self.objective.after_backward()
            for name, value in ({"loss": output.loss.detach()} | output.metrics).items():
                sums[name] = sums.get(name, 0.0) + value.float() / self.config.accumulation_steps
        with self.timer.phase("optimizer"):
            rate = learning_rate_at(self.clock.step, self.config.optimizer, self._expected_steps())
            norm = self.engine.step(rate)
        self._check_finite(norm)
        self._share_observations(batch["position"])
        return sums | {"grad_norm": torch.tensor(norm, device=self.device)}

    def _loss(self, micro: dict[str, torch.Tensor]) -> LossOutput:
        generator = SampleGenerator.for_samples(self.config.seed, micro["position"], self.device)
        return self.objective.loss(self.engine.module, micro, generator)

    def _share_observations(self, positions: torch.Tensor) -> None:
        """What the samples of all workers have shown, for every worker's objective, in the order of the run."""
        rows = self.objective.observations()
        if not rows:
            return
        rows = {name: self._gather(column) for name, column in rows.items()}
        order = self._gather(positions).argsort()
        self.objective.observe({name: column[order] for name, column in rows.items()})

    def _gather(self, column: torch.Tensor) -> torch.Tensor:
        """(n,) of this worker -> (world x n,) of all, by rank; as long on every worker."""
        if self.world_size == 1:
            return column
        columns = [torch.empty_like(column) for _ in range(self.world_size)]
        distributed.all_gather(columns, column.contiguous())
        return torch.cat(columns)

    def _check_finite(self, grad_norm: float) -> None:
        self._skipped = 0 if math.isfinite(grad_norm) else self._skipped + 1
        if self._skipped >= MAX_SKIPPED_STEPS:
            raise TrainingDiverged(
                f"no finite gradient in {self._skipped} steps in a row, up to step {self.clock.step}: lower "
                "optimizer.learning_rate, or set optimizer.grad_clip"
            )

    def _expected_steps(self) -> int:
        """Steps the run will have; an estimate from the pace so far where time ends it."""
        limit, loop = self.config.loop.time_limit_s, self.config.loop
        if limit is None or self.clock.step < 3:
            return loop.max_steps
        return max(1, min(loop.max_steps, round(self.clock.step * limit / max(self.clock.seconds, 1e-9))))

    def _finished(self) -> bool:
        if self.clock.step >= self.config.loop.max_steps:
            return True
        limit = self.config.loop.time_limit_s
        return limit is not None and self.clock.seconds >= limit

    def _save_if_due(self) -> None:
        if self.clock.seconds - self._saved_seconds >= self.config.loop.checkpoint_every_s:
            self._save()

    def _save(self) -> None:
        with self.timer.phase("checkpoint"):
            uri = checkpoint.folder(self.run.checkpoints_uri, self.clock.step)
            checkpoint.save(uri, self.engine, asdict(self.clock), objective=self.objective.state())
            if self.rank == 0:
                checkpoint.collect(self.run.checkpoints_uri, keep_last=self.config.loop.keep_checkpoints)
        self._saved_step, self._saved_seconds = self.clock.step, self.clock.seconds

    def _agree(self, seconds: float) -> float:
        """Worker 0's time, which decides about learning rate, checkpoints and the end: workers must not differ in them."""
        if self.world_size == 1:
            return seconds
        shared = torch.tensor([seconds], dtype=torch.float64, device=self.device)
        distributed.broadcast(shared, src=0)
        return float(shared.item())

    def _log(self, window: _Window) -> None:
        means = window.means(self.world_size, self.device)
        if self.rank != 0:
            return
        rate = window.steps * self.config.loop.global_batch_size / window.elapsed()
        shares = {f"time_{name}": round(share, 4) for name, share in self.timer.window().shares.items()}
        self.run.log(
            {
                "step": self.clock.step,
                "max_steps": self.config.loop.max_steps,
                "samples_seen": self.clock.samples_seen,
                "seconds": round(self.clock.seconds, 3),
                "progress": self._progress(),
                "images_per_second": round(rate, 3),
                "eta_s": self._eta(),
                "learning_rate": learning_rate_at(self.clock.step - 1, self.config.optimizer, self._expected_steps()),
            }
            | means
            | shares
        )

    def _progress(self) -> float:
        loop = self.config.loop
        by_time = self.clock.seconds / loop.time_limit_s if loop.time_limit_s else 0.0
        return min(1.0, max(self.clock.step / loop.max_steps, by_time))

    def _eta(self) -> float:
        progress = self._progress()
        return round(self.clock.seconds * (1.0 - progress) / max(progress, 1e-9), 1)

    def _summary(self) -> dict[str, Any]:
        timing = self.timer.total()
        return asdict(self.clock) | {
            "stage": self.config.stage,
            "world_size": self.world_size,
            "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in self.objective.model.parameters()),
            "time_s": {name: round(seconds, 3) for name, seconds in timing.seconds.items()},
            "time_shares": {name: round(share, 4) for name, share in timing.shares.items()},
        }


class _Window:
    """Sums of metrics since the last log line."""

    def __init__(self) -> None:
        self.steps = 0
        self._sums: dict[str, torch.Tensor] = {}
        self._started = time.monotonic()

    def add(self, values: dict[str, torch.Tensor]) -> None:
        self.steps += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def elapsed(self) -> float:
        return max(time.monotonic() - self._started, 1e-9)

    def means(self, world_size: int, device: torch.device) -> dict[str, float]:
        """Means over the window's steps and all workers; a collective call."""
        names = sorted(self._sums)
        values = torch.stack([torch.as_tensor(self._sums[name]).to(device) for name in names]) / self.steps
        if world_size > 1:
            distributed.all_reduce(values)
            values /= world_size
        return dict(zip(names, values.tolist(), strict=True))
