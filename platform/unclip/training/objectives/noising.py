"""Pictures as the guides of the decoder see them: noised."""

from __future__ import annotations

import torch

from unclip.diffusion.process import DiffusionProcess
from unclip.pipelines.pictures import to_signed
from unclip.utils.random import SampleGenerator


def noised_pictures(
    process: DiffusionProcess, pictures: torch.Tensor, timesteps: torch.Tensor, generator: SampleGenerator
) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> x_t (B, 3, H, W) float32 at the timesteps (B,), by the noise of the pictures' streams."""
    x_start = to_signed(pictures)
    return process.q_sample(x_start, timesteps, generator.normal(tuple(x_start.shape[1:])))
