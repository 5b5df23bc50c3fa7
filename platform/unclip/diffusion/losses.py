"""Training losses, one a sample: mean squared error, the hybrid loss of improved DDPM, and the variational bound."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from unclip.config.base import Config
from unclip.diffusion.process import DiffusionConfig, DiffusionProcess, per_sample
from unclip.diffusion.timestep_sampling import TimestepSampling

_LARGEST_LOG_VARIANCE = 30.0
"""No schedule comes near e^-30 or e^30; within them the bound is finite whatever a network puts out."""


class DiffusionLossConfig(Config):
    """What a diffusion model is trained on."""

    kind: Literal["hybrid", "vlb"] = "hybrid"
    """hybrid: mean squared error, plus the bound where the variance is learned; vlb: the variational bound alone."""

    min_snr_gamma: float | None = Field(default=None, gt=0)
    """Weighs the squared error by min(SNR, gamma) in terms of x_start (Hang et al. 2023: 5); null for equal weights."""

    timestep_sampling: TimestepSampling = "uniform"
    """How timesteps are drawn: uniform, or in proportion to their recent losses, which suits vlb (loss_aware)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "vlb" and self.min_snr_gamma is not None:
            raise ValueError(
                f"min_snr_gamma = {self.min_snr_gamma} weighs the squared error, of which kind vlb has none:"
                " set it to null"
            )
        return self

    def check(self, diffusion: DiffusionConfig) -> None:
        """Raises `ValueError` where this loss does not suit the process."""
        if self.kind == "vlb" and diffusion.variance_type != "learned_range":
            raise ValueError(f"loss kind vlb needs variance_type learned_range, not {diffusion.variance_type}")
        if self.min_snr_gamma is not None and diffusion.zero_terminal_snr:
            raise ValueError(
                f"min_snr_gamma = {self.min_snr_gamma} gives the last timestep no weight where zero_terminal_snr is set:"
                " what sampling starts with would never be trained; set one of them to null or false"
            )


@dataclass(frozen=True)
class DiffusionLoss:
    """Losses of a batch, float32, one a sample."""

    loss: torch.Tensor
    """(B,) what to train on; its mean over uniform timesteps is the objective."""

    mse: torch.Tensor
    """(B,) mean squared error in the target of the prediction type, not weighted."""

    vlb: torch.Tensor | None
    """(B,) this timestep's term of the variational bound in bits per dimension; None where the variance is fixed."""


def diffusion_loss(
    process: DiffusionProcess,
    model_output: torch.Tensor,
    *,
    x_start: torch.Tensor,
    x_t: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    config: DiffusionLossConfig,
) -> DiffusionLoss:
    """The loss of `model_output` for `x_t = q_sample(x_start, timesteps, noise)`, computed in float32.

    Kind hybrid with a learned variance is L_simple + 0.001 L_vlb (Nichol and Dhariwal 2021, section 3.1). L_vlb is a sum
    over the T timesteps of which one is drawn, so its term is weighted by 0.001 T. The mean is detached in it: the bound
    trains the variance only. Kind vlb is L_vlb itself, T times the term, which trains the mean as well. For a bound
    `x_start` has to be pixels in [-1, 1], as its last term counts in 8-bit levels.
    """
    config.check(process.config)
    model_output, x_start, x_t, noise = model_output.float(), x_start.float(), x_t.float(), noise.float()
    prediction, variance_values = process.split(model_output)
    if prediction.shape != x_start.shape:
        raise ValueError(f"prediction has shape {tuple(prediction.shape)}, but x_start {tuple(x_start.shape)}")
    mse = mean_per_sample((prediction - process.target(x_start, noise, timesteps)) ** 2)
    if config.min_snr_gamma is None:
        weighted = mse
    else:
        weighted = mse * per_sample(min_snr_weight(process, timesteps, config.min_snr_gamma), mse)
    if variance_values is None:
        return DiffusionLoss(loss=weighted, mse=mse, vlb=None)
    pred_x_start = process.raw_x_start(prediction if config.kind == "vlb" else prediction.detach(), x_t, timesteps)
    vlb = variational_term(process, pred_x_start, variance_values, x_start=x_start, x_t=x_t, timesteps=timesteps)
    if config.kind == "vlb":
        return DiffusionLoss(loss=vlb * process.num_train_timesteps, mse=mse, vlb=vlb)
    return DiffusionLoss(loss=weighted + vlb * (process.num_train_timesteps / 1000), mse=mse, vlb=vlb)


def min_snr_weight(process: DiffusionProcess, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """(B,) float64 weights of the squared error in the target of the prediction type (Hang et al. 2023).

    All three are min(SNR, gamma) times the squared error of x_start, with SNR = abar / (1 - abar): an error of the noise
    is SNR times that, one of v is SNR + 1 times that.
    """
    abar = process.alphas_cumprod(timesteps)
    snr = abar / (1 - abar)
    clipped = snr.clamp(max=gamma)
    return {"sample": clipped, "epsilon": clipped / snr, "v_prediction": clipped / (snr + 1)}[
        process.config.prediction_type
    ]


def variational_term(
    process: DiffusionProcess,
    pred_x_start: torch.Tensor,
    variance_values: torch.Tensor | None,
    *,
    x_start: torch.Tensor,
    x_t: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """(B,) bits per dimension: L_{t-1} = KL(posterior, model) for t > 0, L_0 = -log p(x_start | x_t) for t = 0.

    The terms of the bound on -log p(x_start) of 8-bit pixels (DDPM eq. 5); the model is p(x_{t-1} | x_t), whose mean is
    that of the posterior at `pred_x_start`. `variance_values` is None where the variance is not learned.
    """
    prev_timesteps = timesteps - 1
    true_mean, true_log_variance = process.posterior(x_start, x_t, timesteps, prev_timesteps)
    mean, _ = process.posterior(pred_x_start, x_t, timesteps, prev_timesteps)
    log_variance = process.model_log_variance(variance_values, x_t, timesteps, prev_timesteps)
    log_variance = log_variance.clamp(-_LARGEST_LOG_VARIANCE, _LARGEST_LOG_VARIANCE)
    kl = 0.5 * (
        log_variance
        - true_log_variance
        - 1
        + (true_log_variance - log_variance).exp()
        + (true_mean - mean) ** 2 * (-log_variance).exp()
    )
    nats = torch.where(
        timesteps == 0,
        -mean_per_sample(_discretized_log_likelihood(x_start, mean, log_variance)),
        mean_per_sample(kl),
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


def mean_per_sample(values: torch.Tensor) -> torch.Tensor:
    """(B, ...) -> (B,)."""
    return values.flatten(1).mean(dim=1)
