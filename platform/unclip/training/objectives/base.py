"""The seam between a stage and the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import nn

from unclip.config.base import Config
from unclip.data.batches import BatchSpec
from unclip.diffusion.losses import DiffusionLossConfig, diffusion_loss
from unclip.diffusion.process import DiffusionProcess
from unclip.diffusion.timestep_sampling import LossAwareTimesteps, uniform_timesteps
from unclip.pipelines.stages import StageConfig
from unclip.utils.random import SampleGenerator

Batch = Mapping[str, torch.Tensor]
"""Tensors of one micro-batch on the worker's device; architecture.md names the columns."""

Rows = Mapping[str, torch.Tensor]
"""Columns (n,) of what was seen of n samples, row by row."""


@dataclass(frozen=True)
class LossOutput:
    """`loss` is a scalar with gradient, the mean over the micro-batch; `metrics` are detached scalar means."""

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def mean_of(cls, rows: Rows) -> Self:
        """The means of what `Objective.losses` answers."""
        metrics = {name: column.detach().mean() for name, column in rows.items() if name != "loss"}
        return cls(rows["loss"].mean(), metrics)


class Objective(ABC):
    """What a stage trains: a module and its loss.

    An objective may learn from the losses of its own samples (its state). The loop hands the `observations` of all
    workers to `observe` of each after every optimizer step, so state is the same on all, and stores it in checkpoints.
    """

    model: nn.Module

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, generator: SampleGenerator) -> LossOutput:
        """The loss of one micro-batch. `model` is `self.model`, possibly wrapped; `generator` has a stream a sample."""

    @abstractmethod
    def losses(
        self, model: nn.Module, batch: Batch, generator: SampleGenerator, timesteps: torch.Tensor | None
    ) -> Rows:
        """What `loss` is the mean of, at given timesteps: `loss` (B,), with gradient, and metrics, one of each a sample.

        `timesteps` (B,) int64 are wanted by objectives that noise their samples, for which `loss` draws them; its
        expectation is the mean of these losses over all timesteps alike. They are None for the others. All else, such as
        dropped conditions, comes from the samples' streams as it does in `loss`.
        """

    @property
    def num_train_timesteps(self) -> int | None:
        """T of an objective that noises its samples; None for the others."""
        return None

    def after_backward(self) -> None:  # noqa: B027  most objectives have nothing to undo
        """Called when the gradient of a micro-batch has been taken."""

    def observations(self) -> Rows:
        """What the calls of `loss` since the last answer have shown, a row a sample in their order; {} for nothing."""
        return {}

    def observe(self, rows: Rows) -> None:  # noqa: B027  nor to learn
        """Takes in the observations of all workers in one optimizer step, ordered by position in the run."""

    def state(self) -> dict[str, torch.Tensor]:
        """Named tensors on the CPU that a resumed run needs beside the weights; the same on all workers."""
        return {}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:  # noqa: B027
        """Goes on from what `state()` gave."""

    def to(self, device: torch.device) -> Objective:
        """Moves what is trained and its helpers to `device`."""
        self.model.to(device)
        return self


class BaseObjectiveConfig(Config):
    """What the training run asks of every objective's configuration."""

    def batch_spec(self) -> BatchSpec:
        """What the stream has to deliver."""
        raise TypeError(f"{type(self).__name__} has no batches")

    def stage_config(self) -> StageConfig:
        """What inference needs to know beside the weights; its `kind` is the stage's name."""
        raise TypeError(f"{type(self).__name__} has no stage")

    @property
    def embedding_columns(self) -> tuple[str, ...]:
        """CLIP embeddings among the inputs."""
        return ()

    def with_embeddings(self, embed_dim: int, statistics: Mapping[str, Any] | None) -> BaseObjectiveConfig:
        """This objective for embeddings of `embed_dim` numbers with those statistics (`mean`, `std`) of z_i."""
        return self

    def check_clip(self, fingerprint: str) -> None:
        """Raises `ConfigError` where what this objective holds was made with another CLIP than that of the embeddings."""

    def build(self) -> Objective:
        """The objective with freshly initialised weights."""
        raise TypeError(f"{type(self).__name__} has no objective")


NormalizationName = Literal["scale", "whiten"]
"""How z_i is brought to unit variance: the paper's constant factor (§2.2), or mean and deviation of the data."""


class DenoisingLoss:
    """What every diffusion stage trains on: one draw of (t, noise) a sample and the loss of the model's answer.

    DDPM (Ho et al. 2020), algorithm 1, with the loss and the draw of t that `config` says. Raises `ValueError` where
    they do not suit the process. What loss-aware draws learn from is the objective's state.
    """

    def __init__(self, process: DiffusionProcess, config: DiffusionLossConfig) -> None:
        config.check(process.config)
        self.process = process
        self.config = config
        loss_aware = config.timestep_sampling == "loss_aware"
        self._history = LossAwareTimesteps(process.num_train_timesteps) if loss_aware else None
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, model: nn.Module, x_start: torch.Tensor, cond: Any, generator: SampleGenerator) -> LossOutput:
        """The loss of a micro-batch `x_start` (B, ...) under `cond`; `generator` has a stream a sample."""
        timesteps, weights = self._draw(generator)
        rows = self.at(timesteps, model, x_start, cond, generator)
        if self._history is not None and torch.is_grad_enabled():  # an evaluation teaches nothing
            self._seen.append((timesteps, rows["loss"].detach()))
        return LossOutput.mean_of({name: weights * column for name, column in rows.items()})

    def at(
        self, timesteps: torch.Tensor, model: nn.Module, x_start: torch.Tensor, cond: Any, generator: SampleGenerator
    ) -> Rows:
        """`loss`, `mse` and, where the variance is learned, `vlb` (B,) of each sample at the given timesteps (B,)."""
        noise = generator.normal(tuple(x_start.shape[1:]))
        x_t = self.process.q_sample(x_start, timesteps, noise)
        loss = diffusion_loss(
            self.process,
            model(x_t, timesteps, cond),
            x_start=x_start,
            x_t=x_t,
            noise=noise,
            timesteps=timesteps,
            config=self.config,
        )
        rows = {"loss": loss.loss, "mse": loss.mse.detach()}
        return rows if loss.vlb is None else rows | {"vlb": loss.vlb.detach()}

    def observations(self) -> Rows:
        """As `Objective.observations`: `timestep` int64 and `loss` float32, or nothing where no draw depends on them."""
        seen, self._seen = self._seen, []
        if not seen:
            return {}
        timesteps, losses = zip(*seen, strict=True)
        return {"timestep": torch.cat(timesteps), "loss": torch.cat(losses)}

    def observe(self, rows: Rows) -> None:
        """As `Objective.observe`."""
        assert self._history is not None
        self._history.observe(rows["timestep"], rows["loss"])

    def state(self) -> dict[str, torch.Tensor]:
        """As `Objective.state`."""
        return {} if self._history is None else self._history.state()

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """As `Objective.load_state`."""
        if self._history is not None:
            self._history.load_state(state)

    def _draw(self, generator: SampleGenerator) -> tuple[torch.Tensor, torch.Tensor]:
        if self._history is None:
            return uniform_timesteps(self.process.num_train_timesteps, generator)
        return self._history.draw(generator)


class DiffusionObjective(Objective):
    """The objective of a diffusion stage: its state is what loss-aware draws of t have learned."""

    denoising: DenoisingLoss

    @abstractmethod
    def inputs(self, batch: Batch, generator: SampleGenerator) -> tuple[torch.Tensor, Any]:
        """What is noised, x_start (B, ...), and what the network is told beside it."""

    def loss(self, model: nn.Module, batch: Batch, generator: SampleGenerator) -> LossOutput:
        return self.denoising(model, *self.inputs(batch, generator), generator)

    def losses(
        self, model: nn.Module, batch: Batch, generator: SampleGenerator, timesteps: torch.Tensor | None
    ) -> Rows:
        assert timesteps is not None
        return self.denoising.at(timesteps, model, *self.inputs(batch, generator), generator)

    @property
    def num_train_timesteps(self) -> int | None:
        return self.denoising.process.num_train_timesteps

    def observations(self) -> Rows:
        return self.denoising.observations()

    def observe(self, rows: Rows) -> None:
        self.denoising.observe(rows)

    def state(self) -> dict[str, torch.Tensor]:
        return self.denoising.state()

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        self.denoising.load_state(state)
