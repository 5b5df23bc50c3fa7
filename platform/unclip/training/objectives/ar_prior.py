"""The autoregressive prior: predict the codes of z_i given the caption and z_t (unCLIP §2.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from unclip.config.base import ConfigError
from unclip.data.batches import BatchSpec
from unclip.data.pca import PrincipalComponents
from unclip.models.ar_prior import code_losses
from unclip.pipelines.stages import ARPriorStageConfig
from unclip.training.objectives.base import BaseObjectiveConfig, Batch, LossOutput, Objective, Rows
from unclip.training.objectives.embeddings import check_embed_dim
from unclip.training.objectives.prior import caption_and_embeddings, prior_condition
from unclip.utils import storage
from unclip.utils.random import SampleGenerator


class ARPriorObjectiveConfig(BaseObjectiveConfig):
    """Training of an autoregressive prior."""

    kind: Literal["ar_prior"] = "ar_prior"
    stage: ARPriorStageConfig
    pca: str = ""
    """File with the principal components of z_i, as jobs/embed.py writes it beside the records; required."""
    text_drop_prob: float = Field(default=0.1, ge=0, le=1)
    """Share of samples that see neither caption nor z_t nor their dot product with z_i (paper: 10%)."""

    @property
    def embedding_columns(self) -> tuple[str, ...]:
        return ("image_embed", "text_embed")

    def with_embeddings(self, embed_dim: int, statistics: Mapping[str, Any] | None) -> ARPriorObjectiveConfig:
        check_embed_dim(self.stage.model.embed_dim, embed_dim)
        if not self.pca:
            raise ConfigError("objective.pca: required, but not given; jobs/embed.py writes it")
        pca = storage.absolute(self.pca)
        basis = PrincipalComponents.load(pca)
        if basis.embed_dim != embed_dim:
            raise ConfigError(
                f"objective.pca = {self.pca!r}: is of embeddings of {basis.embed_dim} numbers, those of this run have "
                f"{embed_dim}; jobs/embed.py writes theirs"
            )
        basis.first(self.stage.model.num_components)  # refuses more than there are
        return self.merged({"pca": pca})

    def check_clip(self, fingerprint: str) -> None:
        """Components of another CLIP's embeddings may have the right width and still mean nothing."""
        basis = PrincipalComponents.load(self.pca)
        if basis.clip != fingerprint:
            raise ConfigError(
                f"objective.pca = {self.pca!r}: is of embeddings by the CLIP of fingerprint {basis.clip}, those of this run "
                f"are by {fingerprint}; jobs/embed.py writes theirs"
            )

    def batch_spec(self) -> BatchSpec:
        return caption_and_embeddings(self.stage.model.context_length, self.embedding_columns)

    def stage_config(self) -> ARPriorStageConfig:
        return self.stage

    def build(self) -> ARPriorObjective:
        return ARPriorObjective(self)


class ARPriorObjective(Objective):
    """Cross-entropy of the dot product z_i.z_t and of every code of z_i, each with the same weight."""

    def __init__(self, config: ARPriorObjectiveConfig) -> None:
        self.config = config
        model = config.stage.model.build()
        basis = PrincipalComponents.load(config.pca).first(config.stage.model.num_components)
        model.codec.set(
            mean=torch.from_numpy(basis.mean),
            components=torch.from_numpy(basis.components),
            deviations=torch.from_numpy(basis.eigenvalues).sqrt(),
        )
        self.model = model
        self._encode = model.encode

    def loss(self, model: nn.Module, batch: Batch, generator: SampleGenerator) -> LossOutput:
        return LossOutput.mean_of(self.losses(model, batch, generator, None))

    def losses(
        self, model: nn.Module, batch: Batch, generator: SampleGenerator, timesteps: torch.Tensor | None
    ) -> Rows:
        cond = prior_condition(batch, generator, self.config.text_drop_prob)
        dots, codes = self._encode(batch["image_embed"], cond.text_embed)
        dot_loss, code_loss = code_losses(model(dots, codes, cond), dots, codes)
        dot_loss = dot_loss * ~cond.text_dropped  # what was dropped is not to be learned from nothing
        losses = (dot_loss + code_loss.sum(dim=1)) / (1 + codes.shape[1])
        return {"loss": losses, "dot_loss": dot_loss.detach(), "code_loss": code_loss.detach().mean(dim=1)}
