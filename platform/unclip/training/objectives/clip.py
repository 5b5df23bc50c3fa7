"""CLIP from scratch: the contrastive space that the other stages live in (unCLIP §2, appendix C; Radford et al. 2021)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from unclip.data.batches import BatchSpec
from unclip.models.clip import ClipArchitectureConfig
from unclip.pipelines.stages import ClipStageConfig
from unclip.training.objectives.base import BaseObjectiveConfig, Batch, LossOutput, Objective, Rows
from unclip.training.objectives.contrastive import contrastive_loss, contrastive_losses, local_contrastive_loss
from unclip.utils.random import SampleGenerator


class ClipObjectiveConfig(BaseObjectiveConfig):
    """Contrastive training of a CLIP."""

    kind: Literal["clip"] = "clip"
    architecture: ClipArchitectureConfig
    sam_rho: float = Field(default=0.0, ge=0)
    """Radius of sharpness-aware minimisation (Foret et al. 2021), 0 for none. As in the paper (appendix C) each worker
    climbs by the loss of its own micro-batch; needs whole weights on each worker, so zero.stage < 3."""

    def batch_spec(self) -> BatchSpec:
        architecture = self.architecture
        return BatchSpec(
            image_size=architecture.image_size, tokenizer="simple", context_length=architecture.context_length
        )

    def stage_config(self) -> ClipStageConfig:
        return ClipStageConfig(architecture=self.architecture)

    def build(self) -> ClipObjective:
        return ClipObjective(self)


class ClipObjective(Objective):
    """Symmetric cross-entropy over the pairs of one micro-batch of all workers (Radford et al. 2021, figure 3).

    Micro-batches of one step do not see each other: of `loop.microbatch_size` times the number of workers pairs, each is
    told from the others.
    """

    def __init__(self, config: ClipObjectiveConfig) -> None:
        self.config = config
        self.model = config.architecture.build()
        self._before_ascent: list[torch.Tensor] = []

    def loss(self, model: nn.Module, batch: Batch, generator: SampleGenerator) -> LossOutput:
        if self.config.sam_rho > 0:
            self._ascend(model, batch)
        return contrastive_loss(model(batch["image"], batch["tokens"]))

    def losses(
        self, model: nn.Module, batch: Batch, generator: SampleGenerator, timesteps: torch.Tensor | None
    ) -> Rows:
        """Where the weights are: sharpness-aware minimisation is a matter of gradients."""
        return contrastive_losses(model(batch["image"], batch["tokens"]))

    def after_backward(self) -> None:
        """Back from where sharpness-aware minimisation took the gradient."""
        if self._before_ascent:
            for parameter, before in zip(self.model.parameters(), self._before_ascent, strict=True):
                parameter.data.copy_(before)
            self._before_ascent = []

    def _ascend(self, model: nn.Module, batch: Batch) -> None:
        """Moves the weights by rho along the gradient of this worker's own pairs (Foret et al. 2021, equation 2)."""
        parameters = list(model.parameters())
        loss = local_contrastive_loss(model(batch["image"], batch["tokens"])).loss
        gradients = torch.autograd.grad(loss, parameters)
        scale = self.config.sam_rho / (nn.utils.get_total_norm(gradients) + 1e-12)
        self._before_ascent = [parameter.detach().clone() for parameter in parameters]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.data.add_(gradient * scale)
        torch.clear_autocast_cache()  # it holds low-precision copies of the weights before the move
