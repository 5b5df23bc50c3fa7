"""DPM-Solver++ (Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling", arXiv 2211.01095)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from unclip.diffusion.process import DiffusionProcess, per_sample
from unclip.diffusion.samplers.base import SamplerState, required


@dataclass(frozen=True)
class DPMSolverPP:
    """DPM-Solver++(2M), algorithm 2, or SDE-DPM-Solver++(2M): second order in lambda = log(alpha / sigma).

    x_start is extrapolated from its last two predictions. The first step has only one, and the step to the clean sample
    (-1) is infinitely long in lambda: these two are of first order. A learned variance is not used.
    """

    stochastic: bool = False
    """Solves the diffusion SDE in place of the probability-flow ODE."""

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
        prediction, _ = process.split(model_output)
        x_start = process.pred_x_start(prediction, x_t, timesteps)
        weight = _history_weight(process, state.last_timesteps, timesteps, prev_timesteps)
        extrapolated = x_start + per_sample(weight, x_t) * (x_start - state.last_x_start)

        abar_t, abar_s = process.alphas_cumprod(timesteps), process.alphas_cumprod(prev_timesteps)
        sigma_s = (1 - abar_s).sqrt()
        shrink = sigma_s / (1 - abar_t).sqrt()
        decay = (abar_t / abar_s).sqrt() * shrink  # exp(-h), h being the step in lambda: 0 where that is infinite
        kept, renewed = (shrink * decay, 1 - decay**2) if self.stochastic else (shrink, 1 - decay)
        x_s = per_sample(kept, x_t) * x_t + per_sample(abar_s.sqrt() * renewed, x_t) * extrapolated
        if self.stochastic:
            x_s = x_s + per_sample(sigma_s * renewed.sqrt(), x_t) * required(noise, "sde-dpmsolver++")
        return SamplerState(x_t=x_s, last_x_start=x_start, last_timesteps=timesteps)


def _history_weight(
    process: DiffusionProcess, last_timesteps: torch.Tensor, timesteps: torch.Tensor, prev_timesteps: torch.Tensor
) -> torch.Tensor:
    """(B,) float64 1 / (2r) of algorithm 2, r being the last step in lambda over this one; 0 for a first-order step."""
    step = _lambda(process, prev_timesteps) - _lambda(process, timesteps)
    last_step = _lambda(process, timesteps) - _lambda(process, last_timesteps)
    first_order = (last_timesteps < 0) | (prev_timesteps < 0)
    return torch.where(first_order, 0.0, step / (2 * last_step))


def _lambda(process: DiffusionProcess, timesteps: torch.Tensor) -> torch.Tensor:
    """(B,) float64 log(alpha / sigma): -inf for pure noise, inf for the clean sample."""
    abar = process.alphas_cumprod(timesteps)
    return 0.5 * (abar.log() - (1 - abar).log())
