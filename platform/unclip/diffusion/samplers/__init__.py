"""Samplers: from noise to a clean sample through any `denoise`, by any list of timesteps."""

from unclip.diffusion.samplers.base import MixedSampler, Sampler, SamplerState
from unclip.diffusion.samplers.ddim import DDIM, ddim_invert
from unclip.diffusion.samplers.ddpm import DDPM
from unclip.diffusion.samplers.dpm_solver import DPMSolverPP
from unclip.diffusion.samplers.loop import Progress
from unclip.diffusion.samplers.sampling import MixedSampling, SamplerName, SamplingConfig

__all__ = [
    "DDIM",
    "DDPM",
    "DPMSolverPP",
    "MixedSampler",
    "MixedSampling",
    "Progress",
    "Sampler",
    "SamplerName",
    "SamplerState",
    "SamplingConfig",
    "ddim_invert",
]
