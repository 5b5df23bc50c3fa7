"""Denoising diffusion implicit models (Song et al. 2021), and their inversion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unclip.diffusion.guidance import ConditionT, Denoise
from unclip.diffusion.process import DiffusionProcess, per_sample
from unclip.diffusion.respacing import inversion_pairs
from unclip.diffusion.samplers.base import SamplerState


@dataclass(frozen=True)
class DDIM:
    """x_s of DDIM eq. 12 with sigma of eq. 16.

    The direction to `x_t` is that of the thresholded x_start, so x_start and noise agree with x_t. A step to the clean
    sample (-1) gives x_start. A learned variance is not used.
    """

    eta: float | torch.Tensor = 0.0
    """0 is deterministic, 1 has the variance of the DDPM posterior; one number, or (B,) for each sample its own."""

    @property
    def stochastic(self) -> bool:
        return bool((torch.as_tensor(self.eta) > 0).any())

    def step(
        self,
        process: DiffusionProcess,
        model_output: torch.Tensor,
        state: SamplerState,
        timesteps: torch.Tensor,
        prev_timesteps: torch.Tensor,
        noise: torch.Tensor | None,
    ) -> SamplerState:
        """See `Sampler.step`. With eta 0, `prev_timesteps` may be later ones too: that is a step of the inversion.

        Equal ones are its first step: `x_t` is a clean sample, and takes on the noise that the network sees in it.
        """
        if noise is None and self.stochastic:
            raise ValueError(f"sampler ddim with eta = {self.eta} needs noise")
        x_t = state.x_t
        prediction, _ = process.split(model_output)
        x_start = process.pred_x_start(prediction, x_t, timesteps)
        pred_noise = process.pred_noise(x_start, x_t, timesteps)
        abar_t, abar_s = process.alphas_cumprod(timesteps), process.alphas_cumprod(prev_timesteps)
        alpha = torch.where(abar_s > 0, abar_t / abar_s, 0.0)  # of an inversion's step up to pure noise, 0 / 0
        variance = self.eta**2 * (1 - abar_s) / (1 - abar_t) * (1 - alpha)
        direction = (1 - abar_s - variance).clamp(min=0).sqrt()
        clean = torch.where(per_sample(timesteps == prev_timesteps, x_t) > 0, x_t, x_start)
        x_s = per_sample(abar_s.sqrt(), x_t) * clean + per_sample(direction, x_t) * pred_noise
        if noise is not None:
            x_s = x_s + per_sample(variance.sqrt(), x_t) * noise
        return SamplerState(x_t=x_s, last_x_start=x_start, last_timesteps=timesteps)


@torch.no_grad()
def ddim_invert(
    denoise: Denoise[ConditionT],
    x_start: torch.Tensor,
    timesteps: Sequence[int],
    process: DiffusionProcess,
    cond: ConditionT,
) -> torch.Tensor:
    """The x_T (B, ...) from which DDIM with eta 0 comes back to `x_start` (B, ...), up to an error of first order.

    DDIM's own step, upwards through `timesteps` (Song et al. 2021, section 4.3; Dhariwal and Nichol 2021, appendix F):
    the direction at each point stands for the one at the next. As the network knows no clean samples, the direction at
    `x_start` is what it says for the least of the `timesteps`.

    Args:
        denoise: the network that the sample is to come back through, guided or not.
        timesteps: the list that it is to come back through, strictly descending, as a sampler takes it.
        cond: what `denoise` takes, prepared where that saves work.
    """
    state = SamplerState.start(x_start)
    for pair in inversion_pairs(timesteps, process.num_train_timesteps):
        level, next_level = torch.tensor(pair, device=x_start.device).expand(len(x_start), 2).unbind(dim=1)
        model_output = denoise(state.x_t, level, cond).to(x_start.dtype)
        state = DDIM().step(process, model_output, state, level, next_level, None)
    return state.x_t
