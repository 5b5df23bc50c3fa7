"""The decoder: a 64x64 picture from z_i and the caption (unCLIP §2.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field
from torch import nn

from unclip.data.batches import BatchSpec
from unclip.models.decoder import DecoderCondition
from unclip.models.text import caption_mask
from unclip.pipelines.pictures import to_signed
from unclip.pipelines.stages import DecoderStageConfig
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


class DecoderObjectiveConfig(BaseObjectiveConfig):
    """Training of a decoder."""

    kind: Literal["decoder"] = "decoder"
    stage: DecoderStageConfig
    image_drop_prob: float = Field(default=0.1, ge=0, le=1)
    """Share of samples that do not see z_i (paper §2.1: 10%)."""
    text_drop_prob: float = Field(default=0.5, ge=0, le=1)
    """Share of samples that do not see the caption (paper §2.1: 50%)."""
    normalization: NormalizationName = "scale"
    """Unit variance of z_i by the paper's constant (`scale`) or by the data's statistics (`whiten`)."""

    @property
    def embedding_columns(self) -> tuple[str, ...]:
        return ("image_embed",)

    def with_embeddings(self, embed_dim: int, statistics: Mapping[str, Any] | None) -> DecoderObjectiveConfig:
        normalizer = fit_normalizer(self.normalization, self.stage.model.embed_dim, embed_dim, statistics)
        return self.model_copy(update={"stage": self.stage.model_copy(update={"normalizer": normalizer})})

    def batch_spec(self) -> BatchSpec:
        stage = self.stage
        return BatchSpec(
            image_size=stage.image_size,
            tokenizer="simple",
            context_length=stage.model.text.context_length,
            embeddings=self.embedding_columns,
        )

    def stage_config(self) -> DecoderStageConfig:
        return self.stage

    def build(self) -> DecoderObjective:
        return DecoderObjective(self)


class DecoderObjective(Objective):
    """The hybrid loss of improved DDPM, with z_i and the caption dropped independently of each other."""

    def __init__(self, config: DecoderObjectiveConfig) -> None:
        self.config = config
        self.model = config.stage.model.build()
        self.process = config.stage.diffusion.build()
        self.normalizer = config.stage.normalizer.build()

    def loss(self, model: nn.Module, batch: Batch, generator: SampleGenerator) -> LossOutput:
        tokens = batch["tokens"].long()
        self.normalizer.to(tokens.device)
        image_dropped = generator.child("image drop").uniform() < self.config.image_drop_prob
        text_dropped = generator.child("text drop").uniform() < self.config.text_drop_prob
        cond = DecoderCondition(
            image_embed=self.normalizer.normalize(batch["image_embed"].float()),
            tokens=tokens,
            text_mask=caption_mask(tokens),
            image_dropped=image_dropped,
            text_dropped=text_dropped,
        )
        output = denoising_loss(self.process, model, to_signed(batch["image"]), cond, generator)
        # The four joint shares: figure 8 of the paper trains on captions alone 5% of the time, which these rates give.
        shares = {
            "share_both": (~image_dropped & ~text_dropped).float().mean(),
            "share_image_only": (~image_dropped & text_dropped).float().mean(),
            "share_text_only": (image_dropped & ~text_dropped).float().mean(),
            "share_neither": (image_dropped & text_dropped).float().mean(),
        }
        return LossOutput(output.loss, output.metrics | shares)
