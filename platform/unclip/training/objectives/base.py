"""The seam between a stage and the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from unclip.config.base import Config
from unclip.data.batches import BatchSpec
from unclip.diffusion.losses import diffusion_loss
from unclip.diffusion.process import DiffusionProcess
from unclip.pipelines.stages import StageConfig
from unclip.utils.random import SampleGenerator

Batch = Mapping[str, torch.Tensor]
"""Tensors of one micro-batch on the worker's device; architecture.md names the columns."""


@dataclass(frozen=True)
class LossOutput:
    """`loss` is a scalar with gradient, the mean over the micro-batch; `metrics` are detached scalar means."""

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


class Objective(ABC):
    """What a stage trains: a module and its loss."""

    model: nn.Module

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, generator: SampleGenerator) -> LossOutput:
        """The loss of one micro-batch. `model` is `self.model`, possibly wrapped; `generator` has a stream a sample."""

    def after_backward(self) -> None:  # noqa: B027  most objectives have nothing to undo
        """Called when the gradient of a micro-batch has been taken."""

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

    def build(self) -> Objective:
        """The objective with freshly initialised weights."""
        raise TypeError(f"{type(self).__name__} has no objective")


NormalizationName = Literal["scale", "whiten"]
"""How z_i is brought to unit variance: the paper's constant factor (§2.2), or mean and deviation of the data."""


def denoising_loss(
    process: DiffusionProcess, model: nn.Module, x_start: torch.Tensor, cond: Any, generator: SampleGenerator
) -> LossOutput:
    """One draw of (t, noise) a sample and the loss of the model's answer (DDPM, Ho et al. 2020, algorithm 1)."""
    timesteps = generator.integers(process.num_train_timesteps)
    noise = generator.normal(tuple(x_start.shape[1:]))
    x_t = process.q_sample(x_start, timesteps, noise)
    model_output = model(x_t, timesteps, cond)
    loss = diffusion_loss(process, model_output, x_start=x_start, x_t=x_t, noise=noise, timesteps=timesteps)
    metrics = {"mse": loss.mse.detach().mean()}
    if loss.vlb is not None:
        metrics["vlb"] = loss.vlb.detach().mean()
    return LossOutput(loss.loss.mean(), metrics)
