"""Samplers: from noise to a clean sample through any `denoise`, by any list of timesteps."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from unclip.config.base import Config
from unclip.diffusion.guidance import Denoise, GuidedConditionT, classifier_free
from unclip.diffusion.process import DiffusionProcess
from unclip.diffusion.respacing import TimestepSpacing, sampling_timesteps
from unclip.diffusion.samplers.ddim import ddim_step, sample_ddim
from unclip.diffusion.samplers.ddpm import ddpm_step, sample_ddpm
from unclip.diffusion.samplers.loop import Progress
from unclip.utils.random import SampleGenerator

__all__ = ["Progress", "SamplingConfig", "ddim_step", "ddpm_step", "sample_ddim", "sample_ddpm"]


class SamplingConfig(Config):
    """How a stage samples."""

    sampler: Literal["ddpm", "ddim"] = "ddpm"
    """Ancestral steps (ddpm) or DDIM."""

    num_inference_steps: int = Field(default=250, ge=1)
    """Number of network evaluations; at most num_train_timesteps."""

    timestep_spacing: TimestepSpacing = "linspace"
    """Which timesteps are visited: linspace, leading, trailing, or GLIDE's list of 27 (fast27)."""

    guidance_scale: float = Field(default=1.0, ge=0)
    """Classifier-free guidance; 1 is off, 0 ignores the condition."""

    eta: float = Field(default=0.0, ge=0, le=1)
    """Noise of a DDIM step: 0 is deterministic, 1 as much as the DDPM posterior's."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sampler == "ddpm" and self.eta != 0:
            raise ValueError(f"eta = {self.eta} is a setting of sampler ddim; sampler ddpm has its variance_type")
        return self

    def timesteps(self, num_train_timesteps: int) -> list[int]:
        """The timesteps visited, descending; `ValueError` where these settings do not suit `num_train_timesteps`."""
        return sampling_timesteps(num_train_timesteps, self.num_inference_steps, self.timestep_spacing)

    def sample(
        self,
        denoise: Denoise[GuidedConditionT],
        x_T: torch.Tensor,
        process: DiffusionProcess,
        generator: SampleGenerator,
        cond: GuidedConditionT,
        *,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """x_start (B, ...) from standard normal `x_T` (B, ...) under `cond`, guided where guidance_scale is not 1.

        Args:
            generator: one stream a sample, on the device of `x_T`.
            progress: called with (steps done, steps in all) after every step.
        """
        if self.guidance_scale != 1:
            learned_variance = process.config.variance_type == "learned_range"
            denoise = classifier_free(denoise, self.guidance_scale, learned_variance=learned_variance)
        timesteps = self.timesteps(process.num_train_timesteps)
        if self.sampler == "ddim":
            return sample_ddim(denoise, x_T, timesteps, process, generator, cond, eta=self.eta, progress=progress)
        return sample_ddpm(denoise, x_T, timesteps, process, generator, cond, progress=progress)
