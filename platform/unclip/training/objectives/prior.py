"""The diffusion prior: denoise z_i given the caption and z_t (unCLIP §2.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field
from torch import nn

from unclip.data.batches import BatchSpec
from unclip.models.prior import PriorCondition
from unclip.models.text import caption_mask
from unclip.pipelines.stages import PriorStageConfig
from unclip.training.objectives.base import (
    BaseObjectiveConfig,
    Batch,
    LossOutput,
    NormalizationName,
    Objective,
    denoising_loss,
)
from unclip.training.objectives.embeddings import fit_normalizer
from unclip.utils.random import SampleGenerator


class PriorObjectiveConfig(BaseObjectiveConfig):
    """Training of a diffusion prior."""

    kind: Literal["prior"] = "prior"
    stage: PriorStageConfig
    text_drop_prob: float = Field(default=0.1, ge=0, le=1)
    """Share of samples that see neither caption nor z_t (paper: 10%), for classifier-free guidance."""
    normalization: NormalizationName = "scale"
    """Unit variance of z_i by the paper's constant (`scale`) or by the data's statistics (`whiten`)."""

    @property
    def embedding_columns(self) -> tuple[str, ...]:
        return ("image_embed", "text_embed")

    def with_embeddings(self, embed_dim: int, statistics: Mapping[str, Any] | None) -> PriorObjectiveConfig:
        normalizer = fit_normalizer(self.normalization, self.stage.model.embed_dim, embed_dim, statistics)
        return self.model_copy(update={"stage": self.stage.model_copy(update={"normalizer": normalizer})})

    def batch_spec(self) -> BatchSpec:
        return BatchSpec(
            tokenizer="simple",
            context_length=self.stage.model.context_length,
            embeddings=self.embedding_columns,
        )

    def stage_config(self) -> PriorStageConfig:
        return self.stage

    def build(self) -> PriorObjective:
        return PriorObjective(self)


class PriorObjective(Objective):
    """MSE between the predicted and the true normalised z_i."""

    def __init__(self, config: PriorObjectiveConfig) -> None:
        self.config = config
        self.model = config.stage.model.build()
        self.process = config.stage.diffusion.build()
        self.normalizer = config.stage.normalizer.build()

    def loss(self, model: nn.Module, batch: Batch, generator: SampleGenerator) -> LossOutput:
        tokens = batch["tokens"].long()
        cond = PriorCondition(
            text_embed=batch["text_embed"].float(),
            tokens=tokens,
            text_mask=caption_mask(tokens),
            text_dropped=generator.child("text drop").uniform() < self.config.text_drop_prob,
        )
        self.normalizer.to(tokens.device)
        x_start = self.normalizer.normalize(batch["image_embed"].float())
        return denoising_loss(self.process, model, x_start, cond, generator)
