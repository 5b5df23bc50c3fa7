"""The upsamplers: a large picture from a small, degraded one (unCLIP §2.1, appendix C)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator

from unclip.data.batches import BatchSpec
from unclip.diffusion.losses import DiffusionLossConfig
from unclip.models.upsampler import UpsamplerCondition
from unclip.pipelines.pictures import to_signed
from unclip.pipelines.stages import UpsamplerStageConfig
from unclip.pipelines.stages.upsampler import low_res_condition
from unclip.training.objectives.base import BaseObjectiveConfig, Batch, DenoisingLoss, DiffusionObjective
from unclip.utils.random import SampleGenerator


class UpsamplerObjectiveConfig(BaseObjectiveConfig):
    """Training of an upsampler on crops."""

    kind: Literal["upsampler"] = "upsampler"
    stage: UpsamplerStageConfig
    loss: DiffusionLossConfig = DiffusionLossConfig()
    """What is minimised, and how timesteps are drawn."""
    crop_fraction: float = Field(default=0.25, gt=0, le=1)
    """Side of the random training crop as a fraction of the target's (paper: a quarter)."""
    degradation: Literal["none", "blur", "bsr"]
    """Corruption of the low-res condition in training: Gaussian blur (paper: 256) or BSR (paper: 1024)."""
    degradation_prob: float = Field(default=1.0, ge=0, le=1)
    """Share of samples that are corrupted; the paper does not say."""

    @model_validator(mode="after")
    def _crops_fit(self) -> UpsamplerObjectiveConfig:
        if self.stage.model.last_step:
            raise ValueError("stage.model.last_step: networks of the last step are imported, and not trained here")
        factor = self.stage.image_size // self.stage.low_res_size
        if (self.stage.image_size * self.crop_fraction) % factor:
            raise ValueError(
                f"crop_fraction {self.crop_fraction} of image_size {self.stage.image_size} must be a whole number of "
                f"low-res pixels ({factor} wide)"
            )
        if self.crop_size % self.stage.model.unet.stride:
            raise ValueError(
                f"crop_fraction {self.crop_fraction} gives crops of {self.crop_size} pixels; the U-Net needs multiples of "
                f"{self.stage.model.unet.stride}"
            )
        return self

    @property
    def crop_size(self) -> int:
        """Pixels of the training crop's side."""
        return int(self.stage.image_size * self.crop_fraction)

    def batch_spec(self) -> BatchSpec:
        stage, crop = self.stage, self.crop_size
        return BatchSpec(
            image_size=stage.image_size,
            crop_size=crop if crop < stage.image_size else None,
            low_res_size=crop * stage.low_res_size // stage.image_size,
            degradation=self.degradation,
            degradation_probability=self.degradation_prob,
        )

    def stage_config(self) -> UpsamplerStageConfig:
        return self.stage

    def build(self) -> UpsamplerObjective:
        return UpsamplerObjective(self)


class UpsamplerObjective(DiffusionObjective):
    """The stage's diffusion loss on a crop, conditioned on the degraded low-res crop.

    With noise conditioning every sample draws the level of its noise, all timesteps equally likely.
    """

    def __init__(self, config: UpsamplerObjectiveConfig) -> None:
        self.config = config
        self.model = config.stage.model.build()
        self.process = config.stage.diffusion.build()
        self.denoising = DenoisingLoss(self.process, config.loss)

    def inputs(self, batch: Batch, generator: SampleGenerator) -> tuple[torch.Tensor, UpsamplerCondition]:
        image = to_signed(batch["image"])
        level = None
        if self.config.stage.model.noise_conditioning:
            level = generator.child("low-res noise level").integers(self.process.num_train_timesteps)
        cond = low_res_condition(
            to_signed(batch["low_res"]),
            image.shape[-1],
            self.process,
            noise_level=level,
            generator=generator,
            resize=self.config.stage.model.resize,
        )
        return image, cond
