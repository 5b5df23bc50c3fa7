"""Ancestral sampling (Ho et al. 2020, algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unclip.diffusion.guidance import ConditionT, Denoise
from unclip.diffusion.process import DiffusionProcess, per_sample
from unclip.diffusion.samplers.loop import Progress, run_steps
from unclip.utils.random import SampleGenerator


def ddpm_step(
    process: DiffusionProcess,
    model_output: torch.Tensor,
    x_t: torch.Tensor,
    timesteps: torch.Tensor,
    prev_timesteps: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """Draws x_s from p(x_s | x_t) with standard normal `noise`; a step to the clean sample (-1) adds none.

    `x_t` and `noise` are (B, ...), `timesteps` and `prev_timesteps` (B,), each sample its own.
    """
    prediction, variance_values = process.split(model_output)
    x_start = process.pred_x_start(prediction, x_t, timesteps)
    mean, _ = process.posterior(x_start, x_t, timesteps, prev_timesteps)
    log_variance = process.model_log_variance(variance_values, x_t, timesteps, prev_timesteps)
    return mean + per_sample(prev_timesteps >= 0, x_t) * (0.5 * log_variance).exp() * noise


def sample_ddpm(
    denoise: Denoise[ConditionT],
    x_T: torch.Tensor,
    timesteps: Sequence[int],
    process: DiffusionProcess,
    generator: SampleGenerator,
    cond: ConditionT,
    *,
    progress: Progress | None = None,
) -> torch.Tensor:
    """x_start (B, ...) sampled from `x_T` by ancestral steps over `timesteps` (strictly descending).

    Noise comes from successive draws of `generator`, so a sample depends on its own key and not on the batch.
    """

    def step(model_output: torch.Tensor, x_t: torch.Tensor, now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        noise = generator.normal(tuple(x_t.shape[1:])).to(x_t.dtype)
        return ddpm_step(process, model_output, x_t, now, before, noise)

    return run_steps(step, denoise, x_T, timesteps, process, cond, progress)
