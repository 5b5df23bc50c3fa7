"""The diffusion prior: denoise z_i given the caption and z_t (unCLIP §2.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from unclip.data.batches import BatchSpec
from unclip.diffusion.losses import DiffusionLossConfig
from unclip.models.prior import PriorCondition
from unclip.pipelines.stages import PriorStageConfig
from unclip.training.objectives.base import (
    BaseObjectiveConfig,
    Batch,
    DenoisingLoss,
    DiffusionObjective,
    NormalizationName,
)
from unclip.training.objectives.embeddings import check_trainable, fit_normalizer
from unclip.utils.random import SampleGenerator


class PriorObjectiveConfig(BaseObjectiveConfig):
    """Training of a diffusion prior."""

    kind: Literal["prior"] = "prior"
    stage: PriorStageConfig
    loss: DiffusionLossConfig = DiffusionLossConfig()
    """What is minimised."""
    text_drop_prob: float = Field(default=0.1, ge=0, le=1)
    """Share of samples that see neither caption nor z_t (paper: 10%), for classifier-free guidance."""
    normalization: NormalizationName = "scale"
    """Unit variance of z_i by the paper's constant (`scale`) or by the data's statistics (`whiten`)."""

    @model_validator(mode="after")
    def _consistent(self) -> PriorObjectiveConfig:
        self.loss.check(self.stage.diffusion)
        check_trainable(unit_norm=self.stage.unit_norm, clip_text=self.stage.model.clip_text is not None)
        return self

    @property
    def embedding_columns(self) -> tuple[str, ...]:
        return ("image_embed", "text_embed")

    def with_embeddings(self, embed_dim: int, statistics: Mapping[str, Any] | None) -> PriorObjectiveConfig:
        normalizer = fit_normalizer(self.normalization, self.stage.model.embed_dim, embed_dim, statistics)
        return self.model_copy(update={"stage": self.stage.model_copy(update={"normalizer": normalizer})})

    def batch_spec(self) -> BatchSpec:
        return caption_and_embeddings(self.stage.model.context_length, self.embedding_columns)

    def stage_config(self) -> PriorStageConfig:
        return self.stage

    def build(self) -> PriorObjective:
        return PriorObjective(self)


class PriorObjective(DiffusionObjective):
    """MSE between the predicted and the true normalised z_i."""

    def __init__(self, config: PriorObjectiveConfig) -> None:
        self.config = config
        self.model = config.stage.model.build()
        self.denoising = DenoisingLoss(config.stage.diffusion.build(), config.loss)
        self.normalizer = config.stage.normalizer.build()

    def inputs(self, batch: Batch, generator: SampleGenerator) -> tuple[torch.Tensor, PriorCondition]:
        cond = prior_condition(batch, generator, self.config.text_drop_prob)
        self.normalizer.to(cond.tokens.device)
        return self.normalizer.normalize(batch["image_embed"].float()), cond


def caption_and_embeddings(context_length: int, columns: tuple[str, ...]) -> BatchSpec:
    """The batches of either prior."""
    return BatchSpec(tokenizer="simple", context_length=context_length, embeddings=columns)


def prior_condition(batch: Batch, generator: SampleGenerator, text_drop_prob: float) -> PriorCondition:
    """What either prior is told of a training batch."""
    dropped: torch.Tensor = generator.child("text drop").uniform() < text_drop_prob
    return PriorCondition.of_captions(batch["text_embed"], batch["tokens"], dropped)
