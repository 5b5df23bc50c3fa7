"""Training losses, one a sample: mean squared error, and the hybrid loss of improved DDPM for learned variances."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from unclip.diffusion.process import DiffusionProcess


@dataclass(frozen=True)
class DiffusionLoss:
    """Losses of a batch, float32, one a sample."""

    loss: torch.Tensor
    """(B,) what to train on: `mse`, plus the weighted `vlb` where the variance is learned."""

    mse: torch.Tensor
    """(B,) mean squared error in the target of the prediction type."""

    vlb: torch.Tensor | None
    """(B,) this timestep's term of the variational bound in bits per dimension; None where the variance is fixed."""


def diffusion_loss(
    process: DiffusionProcess,
    model_output: torch.Tensor,
    x_start: torch.Tensor,
    x_t: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
) -> DiffusionLoss:
    """The loss of `model_output` for `x_t = q_sample(x_start, timesteps, noise)`, computed in float32.

    With a learned variance it is L_simple + 0.001 L_vlb (Nichol and Dhariwal 2021, section 3.1). L_vlb is a sum over
    the T timesteps of which one is drawn, so its term is weighted by 0.001 T. The mean is detached in it: the bound
    trains the variance only. `x_start` has to be pixels in [-1, 1] there, as its last term counts in 8-bit levels.
    """
    model_output, x_start, x_t, noise = model_output.float(), x_start.float(), x_t.float(), noise.float()
    prediction, variance_values = process.split(model_output)
    if prediction.shape != x_start.shape:
        raise ValueError(f"prediction has shape {tuple(prediction.shape)}, but x_start {tuple(x_start.shape)}")
    mse = _mean_per_sample((prediction - process.target(x_start, noise, timesteps)) ** 2)
    if variance_values is None:
        return DiffusionLoss(loss=mse, mse=mse, vlb=None)
    vlb = _vlb_term(process, prediction.detach(), variance_values, x_start, x_t, timesteps)
    return DiffusionLoss(loss=mse + vlb * (process.num_train_timesteps / 1000), mse=mse, vlb=vlb)


def _vlb_term(
    process: DiffusionProcess,
    prediction: torch.Tensor,
    variance_values: torch.Tensor,
    x_start: torch.Tensor,
    x_t: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """(B,) bits per dimension: L_{t-1} = KL(posterior, model) for t > 0, L_0 = -log p(x_start | x_t) for t = 0."""
    prev_timesteps = timesteps - 1
    true_mean, true_log_variance = process.posterior(x_start, x_t, timesteps, prev_timesteps)
    pred_x_start = process.raw_x_start(prediction, x_t, timesteps)
    mean, _ = process.posterior(pred_x_start, x_t, timesteps, prev_timesteps)
    log_variance = process.model_log_variance(variance_values, x_t, timesteps, prev_timesteps)
    kl = 0.5 * (
        log_variance
        - true_log_variance
        - 1
        + (true_log_variance - log_variance).exp()
        + (true_mean - mean) ** 2 * (-log_variance).exp()
    )
    nats = torch.where(
        timesteps == 0,
        -_mean_per_sample(_discretized_log_likelihood(x_start, mean, log_variance)),
        _mean_per_sample(kl),
    )
    return nats / math.log(2)


def _discretized_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Log probability of 8-bit pixels `x` in [-1, 1], each a bin of width 2/255 under a Gaussian (DDPM eq. 13)."""
    precision = (-0.5 * log_variance).exp()
    above = _normal_cdf((x - mean + 1 / 255) * precision)
    below = _normal_cdf((x - mean - 1 / 255) * precision)
    # The outermost bins reach to infinity; the floor keeps the logarithm and its gradient finite.
    log_inner = (above - below).clamp(min=1e-12).log()
    log_left, log_right = above.clamp(min=1e-12).log(), (1 - below).clamp(min=1e-12).log()
    return torch.where(x < -0.999, log_left, torch.where(x > 0.999, log_right, log_inner))


def _normal_cdf(x: torch.Tensor) -> torch.Tensor:
    """The standard normal distribution function, in the tanh approximation that guided-diffusion's loss uses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _mean_per_sample(values: torch.Tensor) -> torch.Tensor:
    return values.flatten(1).mean(dim=1)
