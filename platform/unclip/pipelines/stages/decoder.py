"""The `decoder` stage: CLIP image embedding and caption to the first, small picture (unCLIP §2.1)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from unclip.config.base import Config
from unclip.diffusion.process import DiffusionConfig
from unclip.diffusion.samplers import Progress, SamplingConfig
from unclip.models.decoder import DecoderCondition, DecoderConfig, DecoderModel
from unclip.models.normalizer import EmbeddingNormalizerConfig
from unclip.models.text import caption_mask
from unclip.pipelines.pictures import PICTURE_CHANNELS, picture_noise
from unclip.pipelines.stages.checks import channels_last, check_channels, check_normalizer, check_size, device_of
from unclip.utils.random import SampleGenerator


class DecoderStageConfig(Config):
    """CLIP image embedding and caption to the first, small picture (§2.1)."""

    kind: Literal["decoder"] = "decoder"
    """Names this kind of stage."""
    model: DecoderConfig
    """The U-Net and its text encoder."""
    diffusion: DiffusionConfig
    """The noising process that it was trained to undo."""
    sampling: SamplingConfig
    """How it samples unless a request says otherwise."""
    normalizer: EmbeddingNormalizerConfig
    """Applied to z_i before the network sees it."""
    image_size: int = Field(64, ge=8)
    """Side of its pictures in pixels."""

    @model_validator(mode="after")
    def _consistent(self) -> DecoderStageConfig:
        self.sampling.timesteps(self.diffusion.num_train_timesteps)  # refuses steps that the process does not have
        check_normalizer(self.normalizer, self.model.embed_dim)
        check_channels(self.model.unet, self.diffusion, in_channels=PICTURE_CHANNELS)
        if self.model.unet.image_size != self.image_size:
            raise ValueError(
                f"model.unet.image_size = {self.model.unet.image_size}: must be image_size = {self.image_size}, "
                "or attention would sit at other resolutions than it says"
            )
        check_size(self.image_size, self.model.unet)
        return self

    def build(self) -> DecoderModel:
        """The network with random weights."""
        return self.model.build()


class DecoderStage:
    """CLIP image embedding and caption to the first picture (§2.1); arguments as for `PriorStage`."""

    def __init__(self, config: DecoderStageConfig, model: nn.Module) -> None:
        self.config = config
        self._denoise = channels_last(model)
        self._process = config.diffusion.build()
        self._normalizer = config.normalizer.build().to(device_of(model))

    def sample(
        self,
        image_embed: torch.Tensor,
        tokens: torch.Tensor,
        generator: SampleGenerator,
        *,
        sampling: SamplingConfig,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """(B, 3, S, S) in [-1, 1], S = `config.image_size`.

        Args:
            image_embed: (B, D) z_i, unit norm.
            tokens: (B, L) int64 in the context length of this stage.
            generator: a stream for each of the B pictures.
        """
        kept = tokens.new_zeros(len(tokens), dtype=torch.bool)
        cond = DecoderCondition(
            image_embed=self._normalizer.normalize(image_embed),
            tokens=tokens,
            text_mask=caption_mask(tokens),
            image_dropped=kept,
            text_dropped=kept,
        )
        x_T = picture_noise(generator, self.config.image_size)
        return sampling.sample(self._denoise, x_T, self._process, generator, cond, progress=progress).clamp(-1, 1)
