"""Denoisers that are exact: for Gaussian data every conditional distribution has a closed form.

Data N(mean, S) gives x_t ~ N(sqrt(abar) mean, abar S + (1 - abar) I), and x_start given x_t is Gaussian too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from unclip.diffusion.process import DiffusionConfig, DiffusionProcess
from unclip.diffusion.samplers import Sampler, SamplerState
from unclip.utils.random import SampleGenerator

MEAN, STD = 0.7, 0.4


@dataclass(frozen=True)
class Labels:
    """(B,) means of the data of each sample; the unconditional data has mean 0."""

    values: torch.Tensor

    @property
    def batch_size(self) -> int:
        return len(self.values)

    def unconditional(self) -> Labels:
        return Labels(torch.zeros_like(self.values))

    def cat(self, other: Labels) -> Labels:
        return Labels(torch.cat([self.values, other.values]))

    def select(self, rows: torch.Tensor) -> Labels:
        return Labels(self.values[rows])


def process_of(**settings) -> DiffusionProcess:
    return DiffusionConfig(**settings).build()


def streams(count: int, seed: int = 0) -> SampleGenerator:
    return SampleGenerator.for_samples(seed, torch.arange(count))


def rowwise(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return values.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def as_prediction(process: DiffusionProcess, x_start: torch.Tensor, x_t: torch.Tensor, timesteps) -> torch.Tensor:
    """What a network of this process puts out where it takes the clean sample for `x_start`."""
    abar = rowwise(process.alphas_cumprod(timesteps), x_t)
    noise = (x_t - abar.sqrt() * x_start) / (1 - abar).sqrt()
    return {
        "epsilon": noise,
        "sample": x_start,
        "v_prediction": abar.sqrt() * noise - (1 - abar).sqrt() * x_start,
    }[process.config.prediction_type]


class GaussianDenoiser:
    """The network that training would end with for data N(mean, STD^2), `mean` being MEAN or the sample's label."""

    def __init__(self, process: DiffusionProcess) -> None:
        self.process = process

    def x_start(self, x_t: torch.Tensor, abar: torch.Tensor, mean: float | torch.Tensor) -> torch.Tensor:
        """E[x_start | x_t] by the regression of jointly Gaussian variables."""
        gain = abar.sqrt() * STD**2 / (abar * STD**2 + 1 - abar)
        return mean + gain * (x_t - abar.sqrt() * mean)

    def __call__(self, x_t: torch.Tensor, timesteps: torch.Tensor, cond: Labels | None) -> torch.Tensor:
        abar = rowwise(self.process.alphas_cumprod(timesteps), x_t)
        mean = MEAN if cond is None else rowwise(cond.values, x_t)
        return as_prediction(self.process, self.x_start(x_t, abar, mean), x_t, timesteps)


class CorrelatedDenoiser:
    """The exact network for data N(mean (D,), covariance (D, D))."""

    def __init__(self, process: DiffusionProcess, mean: torch.Tensor, covariance: torch.Tensor) -> None:
        self.process, self.mean = process, mean
        self.variances, self.axes = torch.linalg.eigh(covariance)

    def x_start(self, x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        abar = rowwise(self.process.alphas_cumprod(timesteps), x_t)
        gain = abar.sqrt() * self.variances / (abar * self.variances + 1 - abar)
        return self.mean + ((x_t - abar.sqrt() * self.mean) @ self.axes * gain) @ self.axes.T

    def __call__(self, x_t: torch.Tensor, timesteps: torch.Tensor, cond: None) -> torch.Tensor:
        return as_prediction(self.process, self.x_start(x_t, timesteps), x_t, timesteps)


def advance(sampler: Sampler, process: DiffusionProcess, model_output, x_t, timesteps, prev_timesteps, noise=None):
    """x_s after one step from `x_t`, without a history."""
    return sampler.step(process, model_output, SamplerState.start(x_t), timesteps, prev_timesteps, noise).x_t


def moments(
    sampler: Sampler, process: DiffusionProcess, denoise, pairs: list[tuple[int, int]], dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact mean (D,) and covariance (D, D) of what `sampler` makes of x_T ~ N(0, I) with a network affine in x_t.

    Everything is affine in x_T and the noise of each step: the sample without any is the mean, and the answers to a unit
    of each, one a row, make up the covariance.
    """
    sources = torch.eye(dim * (len(pairs) + 1), dtype=torch.float64)
    sources = torch.cat([torch.zeros_like(sources[:1]), sources]).reshape(-1, len(pairs) + 1, dim)
    state = SamplerState.start(sources[:, 0])
    for step, (timestep, previous) in enumerate(pairs, start=1):
        now = torch.full((len(sources),), timestep)
        noise = sources[:, step] if sampler.stochastic else None
        output = denoise(state.x_t, now, None)
        state = sampler.step(process, output, state, now, torch.full_like(now, previous), noise)
    answers = state.x_t[1:] - state.x_t[0]
    return state.x_t[0], answers.T @ answers
