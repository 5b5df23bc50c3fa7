"""The noised CLIP: a CLIP whose pictures are noised as those that it is to guide (GLIDE, Nichol et al. 2021, section 4.4)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from unclip.data.batches import BatchSpec
from unclip.pipelines.stages import NoisedClipStageConfig
from unclip.training.objectives.base import BaseObjectiveConfig, Batch, LossOutput, Objective, Rows
from unclip.training.objectives.contrastive import Embeddings, contrastive_loss, contrastive_losses
from unclip.training.objectives.noising import noised_pictures
from unclip.utils.random import SampleGenerator


class NoisedClipObjectiveConfig(BaseObjectiveConfig):
    """Contrastive training of a noised CLIP."""

    kind: Literal["noised_clip"] = "noised_clip"
    stage: NoisedClipStageConfig

    def batch_spec(self) -> BatchSpec:
        context_length = self.stage.model.text.context_length
        return BatchSpec(image_size=self.stage.image_size, tokenizer="simple", context_length=context_length)

    def stage_config(self) -> NoisedClipStageConfig:
        return self.stage

    def build(self) -> NoisedClipObjective:
        return NoisedClipObjective(self)


class NoisedClipObjective(Objective):
    """CLIP's loss, each picture at a timestep of its own."""

    def __init__(self, config: NoisedClipObjectiveConfig) -> None:
        self.model = config.stage.build()
        self.process = config.stage.diffusion.build()

    def loss(self, model: nn.Module, batch: Batch, generator: SampleGenerator) -> LossOutput:
        timesteps = generator.integers(self.process.num_train_timesteps)
        return contrastive_loss(self._embed(model, batch, generator, timesteps))

    def losses(
        self, model: nn.Module, batch: Batch, generator: SampleGenerator, timesteps: torch.Tensor | None
    ) -> Rows:
        assert timesteps is not None
        return contrastive_losses(self._embed(model, batch, generator, timesteps))

    @property
    def num_train_timesteps(self) -> int | None:
        return self.process.num_train_timesteps

    def _embed(self, model: nn.Module, batch: Batch, generator: SampleGenerator, timesteps: torch.Tensor) -> Embeddings:
        x_t = noised_pictures(self.process, batch["image"], timesteps, generator)
        embeddings: Embeddings = model(x_t, timesteps, batch["tokens"].long())
        return embeddings
