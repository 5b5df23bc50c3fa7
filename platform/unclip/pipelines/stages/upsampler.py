"""The upsampler stages: a picture to the same picture several times as large (unCLIP §2.1)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from unclip.config.base import Config
from unclip.diffusion.guidance import Guide
from unclip.diffusion.process import DiffusionConfig, DiffusionProcess
from unclip.diffusion.samplers import Progress, SamplingConfig
from unclip.models.upsampler import Resize, UpsamplerCondition, UpsamplerConfig, UpsamplerModel, upsample_low_res
from unclip.pipelines.pictures import PICTURE_CHANNELS, picture_noise, to_signed, to_uint8
from unclip.pipelines.stages.checks import channels_last, check_channels, check_signed, check_size
from unclip.pipelines.stages.diffusion_stage import DiffusionStage, Start
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
    low_res_noise_level: int = Field(default=0, ge=0)
    """With model.noise_conditioning: noise on the picture it takes when it samples, a timestep of `diffusion`. More of it
    hides more of what the stage before got wrong, and leaves more to be invented."""

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
        levels = self.diffusion.num_train_timesteps if self.model.noise_conditioning else 1
        if self.low_res_noise_level >= levels:
            raise ValueError(
                f"low_res_noise_level = {self.low_res_noise_level}: must be below {levels} with model.noise_conditioning "
                f"= {self.model.noise_conditioning} and diffusion.num_train_timesteps = {self.diffusion.num_train_timesteps}"
            )
        return self

    @property
    def in_clip_space(self) -> bool:
        """Whether its network sees or makes a CLIP's embeddings, and so fits only bundles of that CLIP."""
        return False

    def build(self) -> UpsamplerModel:
        """The network with random weights."""
        return self.model.build()


def low_res_condition(
    low_res: torch.Tensor,
    size: int,
    process: DiffusionProcess,
    *,
    noise_level: torch.Tensor | None,
    generator: SampleGenerator,
    resize: Resize,
) -> UpsamplerCondition:
    """What an upsampler is told of a small picture: the one way it is made, in training and in sampling.

    The picture is rounded to the 8 bits that it has in data and in files (GLIDE does so too), noised (Ho et al. 2022,
    "Cascaded diffusion models": non-truncated conditioning augmentation) and interpolated. What training does to
    pictures before that, to make them like those of the stage before, is `unclip.data.degradation.make_low_res`.

    Args:
        low_res: (B, 3, h, w) in [-1, 1].
        size: side of the large picture or crop in pixels.
        process: whose noise it is.
        noise_level: (B,) int64, timestep of each picture's noise; None for no noise.
        generator: a stream for each of the B pictures.
        resize: how it is interpolated.
    """
    picture = to_signed(to_uint8(low_res))
    if noise_level is not None:
        noise = generator.child("low-res noise").normal(tuple(picture.shape[1:]))
        picture = process.q_sample(picture, noise_level, noise)
    return UpsamplerCondition(upsample_low_res(picture, (size, size), resize), noise_level)


class UpsamplerStage(DiffusionStage):
    """A picture to the same picture several times as large (§2.1); arguments as for `DiffusionStage`."""

    def __init__(self, config: UpsamplerStageConfig, model: nn.Module) -> None:
        super().__init__(config, channels_last(model))
        self.config = config

    def begin(self, low_res: torch.Tensor, generator: SampleGenerator) -> Start:
        """Arguments as for `sample`."""
        config = self.config
        expected = (PICTURE_CHANNELS, config.low_res_size, config.low_res_size)
        if tuple(low_res.shape[1:]) != expected:
            raise ValueError(f"low_res must be (B, {', '.join(map(str, expected))}), not {tuple(low_res.shape)}")
        check_signed("low_res", low_res)
        level = None
        if config.model.noise_conditioning:
            level = torch.full((len(low_res),), config.low_res_noise_level, dtype=torch.int64, device=low_res.device)
        cond = low_res_condition(
            low_res,
            config.image_size,
            self.process,
            noise_level=level,
            generator=generator,
            resize=config.model.resize,
        )
        return Start(picture_noise(generator, config.image_size), cond)

    def finish(self, x_start: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) in [-1, 1]."""
        return x_start.clamp(-1, 1)

    def sample(
        self,
        low_res: torch.Tensor,
        generator: SampleGenerator,
        *,
        sampling: SamplingConfig,
        x_T: torch.Tensor | None = None,
        guide: Guide | None = None,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """(B, 3, S, S) in [-1, 1], S = `config.image_size`.

        Args:
            low_res: (B, 3, s, s) in [-1, 1] with s = `config.low_res_size`.
            generator: a stream for each of the B pictures.
            x_T: (B, 3, S, S) to begin from; None: drawn from `generator`.
            guide: guidance of the caller's own.

        Raises `ValueError` where the pictures have another size or range.
        """
        start = self.begin(low_res, generator).at(x_T)
        return self.run(start, generator, sampling=sampling, guide=guide, progress=progress)
