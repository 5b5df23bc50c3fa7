"""Ancestral sampling (Ho et al. 2020, algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from unclip.diffusion.process import DiffusionProcess, per_sample
from unclip.diffusion.samplers.base import SamplerState, required


@dataclass(frozen=True)
class DDPM:
    """Draws x_s from p(x_s | x_t) with the variance of the process; a step to the clean sample (-1) adds no noise."""

    @property
    def stochastic(self) -> bool:
        return True

    def step(
        self,
        process: DiffusionProcess,
        model_output: torch.Tensor,
        state: SamplerState,
        timesteps: torch.Tensor,
        prev_timesteps: torch.Tensor,
        noise: torch.Tensor | None,
    ) -> SamplerState:
        """See `Sampler.step`."""
        x_t = state.x_t
        prediction, variance_values = process.split(model_output)
        x_start = process.pred_x_start(prediction, x_t, timesteps)
        mean, _ = process.posterior(x_start, x_t, timesteps, prev_timesteps)
        if variance_values is not None:  # beyond its bounds it does little in training, and explodes over longer steps
            variance_values = variance_values.clamp(-1, 1)
        log_variance = process.model_log_variance(variance_values, x_t, timesteps, prev_timesteps)
        deviation = per_sample(prev_timesteps >= 0, x_t) * (0.5 * log_variance).exp()
        x_s = mean + deviation * required(noise, "ddpm")
        return SamplerState(x_t=x_s, last_x_start=x_start, last_timesteps=timesteps)
