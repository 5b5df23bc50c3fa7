"""How well a diffusion model explains pictures: the variational bound, term by term."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from unclip.diffusion.guidance import ConditionT, Denoise
from unclip.diffusion.losses import mean_per_sample, variational_term
from unclip.diffusion.process import DiffusionProcess
from unclip.utils.random import SampleGenerator


@dataclass(frozen=True)
class Likelihood:
    """Upper bounds of -log2 p(x_start) per dimension and what they consist of; the float type is that of the samples."""

    total: torch.Tensor
    """(B,) bits per dimension: `prior` and the sum of `vlb_by_timestep`."""

    prior: torch.Tensor
    """(B,) L_T: what x_T still tells of the sample. Nothing can be learned in it."""

    vlb_by_timestep: torch.Tensor
    """(B, T) L_0 to L_{T-1}, column t for the step from timestep t."""

    mse_by_timestep: torch.Tensor
    """(B, T) mean squared error in the target of the prediction type at each timestep."""


@torch.no_grad()
def bits_per_dimension(
    denoise: Denoise[ConditionT],
    x_start: torch.Tensor,
    process: DiffusionProcess,
    generator: SampleGenerator,
    cond: ConditionT,
) -> Likelihood:
    """The whole bound of DDPM eq. 5 on 8-bit pixels `x_start` (B, ...) in [-1, 1], as improved DDPM reports it.

    Takes T network evaluations, and one draw of noise a sample for each. The model is the one that ancestral sampling
    over all timesteps has: predictions are thresholded as the process is configured.

    Raises `ValueError` where `x_start` leaves [-1, 1].
    """
    largest = float(x_start.abs().max())
    if not largest <= 1:
        raise ValueError(f"x_start must be pixels in [-1, 1], but holds {largest:.3g}")
    vlb, mse = [], []
    for timestep in range(process.num_train_timesteps):
        timesteps = torch.full(x_start.shape[:1], timestep, dtype=torch.int64, device=x_start.device)
        noise = generator.normal(tuple(x_start.shape[1:])).to(x_start.dtype)
        x_t = process.q_sample(x_start, timesteps, noise)
        prediction, variance_values = process.split(denoise(x_t, timesteps, cond).to(x_t.dtype))
        pred_x_start = process.pred_x_start(prediction, x_t, timesteps)
        vlb.append(
            variational_term(process, pred_x_start, variance_values, x_start=x_start, x_t=x_t, timesteps=timesteps)
        )
        mse.append(mean_per_sample((prediction - process.target(x_start, noise, timesteps)) ** 2))
    prior = _prior_term(process, x_start)
    by_timestep = torch.stack(vlb, dim=1)
    return Likelihood(prior + by_timestep.sum(dim=1), prior, by_timestep, torch.stack(mse, dim=1))


def _prior_term(process: DiffusionProcess, x_start: torch.Tensor) -> torch.Tensor:
    """(B,) L_T = KL(q(x_T | x_start), N(0, 1)) in bits per dimension."""
    last = torch.full(x_start.shape[:1], process.num_train_timesteps - 1, dtype=torch.int64, device=x_start.device)
    abar = process.alphas_cumprod(last)
    power = mean_per_sample(x_start.double() ** 2)
    nats = 0.5 * (abar * power - abar - torch.log1p(-abar))
    return (nats / math.log(2)).to(x_start.dtype)
