"""The upsampler stages: a picture to the same picture several times as large (unCLIP §2.1)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from unclip.config.base import Config
from unclip.diffusion.process import DiffusionConfig
from unclip.diffusion.samplers import Progress, SamplingConfig
from unclip.models.upsampler import UpsamplerCondition, UpsamplerConfig, UpsamplerModel
from unclip.pipelines.pictures import PICTURE_CHANNELS, picture_noise
from unclip.pipelines.stages.checks import channels_last, check_channels, check_size
from unclip.utils.random import SampleGenerator


class UpsamplerStageConfig(Config):
    """A picture to the same picture several times as large, without a caption (§2.1)."""

    kind: Literal["upsampler_256", "upsampler_1024"]
    """Which of the two it is."""
    model: UpsamplerConfig
    """The convolutional U-Net."""
    diffusion: DiffusionConfig
    """The noising process that it was trained to undo."""
    sampling: SamplingConfig
    """How it samples unless a request says otherwise."""
    low_res_size: int = Field(ge=8)
    """Side of the pictures it takes in pixels: what the stage before makes."""
    image_size: int = Field(ge=16)
    """Side of its pictures in pixels."""

    @model_validator(mode="after")
    def _consistent(self) -> UpsamplerStageConfig:
        self.sampling.timesteps(self.diffusion.num_train_timesteps)  # refuses steps that the process does not have
        if self.sampling.guidance_scale != 1.0:
            raise ValueError(
                f"sampling.guidance_scale = {self.sampling.guidance_scale}: "
                "an upsampler has no caption to guide it; only 1.0 is allowed"
            )
        check_channels(self.model.unet, self.diffusion, in_channels=2 * PICTURE_CHANNELS)
        check_size(self.image_size, self.model.unet)
        if self.image_size % self.low_res_size or self.image_size == self.low_res_size:
            raise ValueError(
                f"image_size = {self.image_size}: must be a multiple of low_res_size = {self.low_res_size}, and larger"
            )
        return self

    def build(self) -> UpsamplerModel:
        """The network with random weights."""
        return self.model.build()


class UpsamplerStage:
    """A picture to the same picture several times as large (§2.1); arguments as for `PriorStage`."""

    def __init__(self, config: UpsamplerStageConfig, model: nn.Module) -> None:
        self.config = config
        self._denoise = channels_last(model)
        self._process = config.diffusion.build()

    def sample(
        self,
        low_res: torch.Tensor,
        generator: SampleGenerator,
        *,
        sampling: SamplingConfig,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """(B, 3, S, S) in [-1, 1], S = `config.image_size`.

        Args:
            low_res: (B, 3, s, s) in [-1, 1] with s = `config.low_res_size`, on the grid of 8-bit pictures.
            generator: a stream for each of the B pictures.
        """
        expected = (PICTURE_CHANNELS, self.config.low_res_size, self.config.low_res_size)
        if tuple(low_res.shape[1:]) != expected:
            raise ValueError(f"low_res must be (B, {', '.join(map(str, expected))}), not {tuple(low_res.shape)}")
        cond = UpsamplerCondition(low_res=low_res)
        x_T = picture_noise(generator, self.config.image_size)
        return sampling.sample(self._denoise, x_T, self._process, generator, cond, progress=progress).clamp(-1, 1)
