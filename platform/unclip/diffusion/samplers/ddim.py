"""Denoising diffusion implicit models (Song et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unclip.diffusion.guidance import ConditionT, Denoise
from unclip.diffusion.process import DiffusionProcess, per_sample
from unclip.diffusion.samplers.loop import Progress, run_steps
from unclip.utils.random import SampleGenerator


def ddim_step(
    process: DiffusionProcess,
    model_output: torch.Tensor,
    x_t: torch.Tensor,
    timesteps: torch.Tensor,
    prev_timesteps: torch.Tensor,
    noise: torch.Tensor | None,
    *,
    eta: float,
) -> torch.Tensor:
    """x_s of DDIM eq. 12 with sigma of eq. 16: `eta` 0 is deterministic, 1 has the variance of the DDPM posterior.

    The direction to `x_t` is that of the thresholded x_start, so x_start and noise agree with x_t. A step to the clean
    sample (-1) gives x_start. A learned variance is not used.

    Args:
        noise: standard normal, shaped like `x_t`; None only with `eta` 0.
    """
    if noise is None and eta > 0:
        raise ValueError(f"eta = {eta} needs noise")
    prediction, _ = process.split(model_output)
    x_start = process.pred_x_start(prediction, x_t, timesteps)
    pred_noise = process.pred_noise(x_start, x_t, timesteps)
    abar_t, abar_s = process.alphas_cumprod(timesteps), process.alphas_cumprod(prev_timesteps)
    variance = eta**2 * (1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)
    direction = (1 - abar_s - variance).clamp(min=0).sqrt()
    x_s = per_sample(abar_s.sqrt(), x_t) * x_start + per_sample(direction, x_t) * pred_noise
    return x_s if noise is None else x_s + per_sample(variance.sqrt(), x_t) * noise


def sample_ddim(
    denoise: Denoise[ConditionT],
    x_T: torch.Tensor,
    timesteps: Sequence[int],
    process: DiffusionProcess,
    generator: SampleGenerator,
    cond: ConditionT,
    *,
    eta: float = 0.0,
    progress: Progress | None = None,
) -> torch.Tensor:
    """x_start (B, ...) sampled from `x_T` by DDIM steps over `timesteps` (strictly descending).

    Noise comes from successive draws of `generator`, so a sample depends on its own key and not on the batch; with
    `eta` 0 nothing is drawn.
    """

    def step(model_output: torch.Tensor, x_t: torch.Tensor, now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        noise = generator.normal(tuple(x_t.shape[1:])).to(x_t.dtype) if eta > 0 else None
        return ddim_step(process, model_output, x_t, now, before, noise, eta=eta)

    return run_steps(step, denoise, x_T, timesteps, process, cond, progress)
