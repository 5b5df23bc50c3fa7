"""Pictures as the guides of the decoder see them: noised, at timesteps drawn evenly."""

from __future__ import annotations

import torch

from unclip.diffusion.process import DiffusionProcess
from unclip.pipelines.pictures import to_signed
from unclip.utils.random import SampleGenerator


def noised_pictures(
    process: DiffusionProcess, pictures: torch.Tensor, generator: SampleGenerator
) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 (B, H, W, 3) -> x_t (B, 3, H, W) float32 and its timesteps (B,), uniform in 0..T-1, one draw a picture."""
    x_start = to_signed(pictures)
    timesteps = generator.integers(process.num_train_timesteps)
    return process.q_sample(x_start, timesteps, generator.normal(tuple(x_start.shape[1:]))), timesteps
