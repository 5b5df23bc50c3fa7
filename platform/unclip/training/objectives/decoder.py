"""The decoder: a 64x64 picture from z_i and the caption (unCLIP §2.1), the caption alone (GLIDE) or a class (ADM)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from unclip.data.batches import BatchSpec
from unclip.diffusion.losses import DiffusionLossConfig
from unclip.models.decoder import DecoderCondition
from unclip.pipelines.pictures import to_signed
from unclip.pipelines.stages import DecoderStageConfig
from unclip.pipelines.stages.decoder import decoder_condition
from unclip.training.objectives.base import (
    BaseObjectiveConfig,
    Batch,
    DenoisingLoss,
    DiffusionObjective,
    LossOutput,
    NormalizationName,
)
from unclip.training.objectives.embeddings import check_trainable, fit_normalizer
from unclip.utils.random import SampleGenerator


class DecoderObjectiveConfig(BaseObjectiveConfig):
    """Training of a decoder."""

    kind: Literal["decoder"] = "decoder"
    stage: DecoderStageConfig
    loss: DiffusionLossConfig = DiffusionLossConfig()
    """What is minimised, and how timesteps are drawn."""
    image_drop_prob: float = Field(default=0.1, ge=0, le=1)
    """Share of samples that do not see z_i (paper §2.1: 10%)."""
    text_drop_prob: float = Field(default=0.5, ge=0, le=1)
    """Share of samples that do not see the caption (paper §2.1: 50%)."""
    label_drop_prob: float = Field(default=0.1, ge=0, le=1)
    """Share of samples that do not see their class (Ho and Salimans 2022: 10 to 20%)."""
    normalization: NormalizationName = "scale"
    """Unit variance of z_i by the paper's constant (`scale`) or by the data's statistics (`whiten`)."""

    @model_validator(mode="after")
    def _trainable(self) -> DecoderObjectiveConfig:
        check_trainable(unit_norm=self.stage.unit_norm, clip_text=self.stage.model.clip_text is not None)
        return self

    @property
    def embedding_columns(self) -> tuple[str, ...]:
        return tuple(name for name in ("image_embed", "text_states") if name in self.stage.model.inputs)

    def with_embeddings(self, embed_dim: int, statistics: Mapping[str, Any] | None) -> DecoderObjectiveConfig:
        model_dim = self.stage.model.embed_dim
        if model_dim is None:
            return self
        normalizer = fit_normalizer(self.normalization, model_dim, embed_dim, statistics)
        return self.model_copy(update={"stage": self.stage.model_copy(update={"normalizer": normalizer})})

    def batch_spec(self) -> BatchSpec:
        stage = self.stage
        length = stage.model.context_length
        captions = {} if length is None else {"tokenizer": "simple", "context_length": length}
        return BatchSpec(
            image_size=stage.image_size,
            embeddings=self.embedding_columns,
            label_column=stage.label_column,
            classes=stage.classes,
            **captions,
        )

    def stage_config(self) -> DecoderStageConfig:
        return self.stage

    def build(self) -> DecoderObjective:
        return DecoderObjective(self)


class DecoderObjective(DiffusionObjective):
    """The stage's diffusion loss, with each input dropped independently of the others."""

    def __init__(self, config: DecoderObjectiveConfig) -> None:
        self.config = config
        self.model = config.stage.model.build()
        self.process = config.stage.diffusion.build()
        self.normalizer = config.stage.normalizer.build()
        self.denoising = DenoisingLoss(self.process, config.loss)

    def loss(self, model: nn.Module, batch: Batch, generator: SampleGenerator) -> LossOutput:
        x_start, cond = self.inputs(batch, generator)
        output = self.denoising(model, x_start, cond, generator)
        return LossOutput(
            output.loss, output.metrics | _shares({name: part.dropped for name, part in cond.parts().items()})
        )

    def inputs(self, batch: Batch, generator: SampleGenerator) -> tuple[torch.Tensor, DecoderCondition]:
        config, x_start = self.config, to_signed(batch["image"])
        rates = {"image": config.image_drop_prob, "text": config.text_drop_prob, "label": config.label_drop_prob}
        dropped = {name: generator.child(f"{name} drop").uniform() < rate for name, rate in rates.items()}
        return x_start, decoder_condition(config.stage.model, self._told(batch, x_start, generator), dropped)

    def _told(self, batch: Batch, x_start: torch.Tensor, generator: SampleGenerator) -> dict[str, torch.Tensor]:
        inputs = dict(batch)
        if "image_embed" in inputs:
            self.normalizer.to(x_start.device)
            inputs["image_embed"] = self.normalizer.normalize(inputs["image_embed"].float())
        if "tokens" in inputs:
            inputs["tokens"] = inputs["tokens"].long()
        if self.config.stage.model.text_states is not None:
            states = self.config.stage.model.text_states
            inputs["text_states"] = inputs["text_states"].unflatten(1, (states.context_length, states.state_dim))
        if self.config.stage.model.inpainting:
            inputs |= {"known": x_start, "known_mask": known_mask(generator.child("known"), x_start.shape[-1])}
        return inputs


def known_mask(generator: SampleGenerator, size: int) -> torch.Tensor:
    """(B, 1, size, size) float, 1 = known: what an inpainting decoder is shown of each picture.

    GLIDE (section 4.3) erases "random regions" and says no more. Here a rectangle, of any place and size, is the unknown
    part of a third of the pictures (inpainting) and the known part of another (outpainting); of the last third nothing
    is known, so that drawing from nothing is not unlearned.
    """
    kind, *sides = generator.uniform((5,)).unsqueeze(-1).unbind(dim=1)
    pixels = (torch.arange(size, device=kind.device) + 0.5) / size
    between = [((pixels >= torch.minimum(a, b)) & (pixels < torch.maximum(a, b))) for a, b in (sides[:2], sides[2:])]
    inside = between[0][:, :, None] & between[1][:, None, :]
    kind = kind[:, :, None]
    return torch.where(kind < 1 / 3, ~inside, inside & (kind < 2 / 3))[:, None].float()


def _shares(dropped: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Shares of samples by what they see.

    Of unCLIP's two inputs the four joint shares: figure 8 of the paper trains on captions alone 5% of the time, which
    its rates give.
    """
    if dropped.keys() != {"image", "text"}:
        return {f"share_without_{name}": rows.float().mean() for name, rows in dropped.items()}
    image, text = dropped["image"], dropped["text"]
    return {
        "share_both": (~image & ~text).float().mean(),
        "share_image_only": (~image & text).float().mean(),
        "share_text_only": (image & ~text).float().mean(),
        "share_neither": (image & text).float().mean(),
    }
