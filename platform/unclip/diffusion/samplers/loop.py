"""The loop that samplers share: network, step, next timestep."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from unclip.diffusion.guidance import ConditionT, Denoise
from unclip.diffusion.process import DiffusionProcess
from unclip.diffusion.respacing import step_pairs

Progress = Callable[[int, int], None]
"""progress(steps done, steps in all), called after every step."""

Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""step(model_output, x_t, timesteps, prev_timesteps) -> the sample at prev_timesteps."""


@torch.no_grad()
def run_steps(
    step: Step,
    denoise: Denoise[ConditionT],
    x_T: torch.Tensor,
    timesteps: Sequence[int],
    process: DiffusionProcess,
    cond: ConditionT,
    progress: Progress | None,
) -> torch.Tensor:
    """Takes `x_T` through `timesteps` (strictly descending) to the clean sample, in the float type of `x_T`."""
    x_t = x_T
    pairs = step_pairs(timesteps, process.num_train_timesteps)
    for done, (timestep, prev_timestep) in enumerate(pairs, start=1):
        now = torch.full(x_t.shape[:1], timestep, dtype=torch.int64, device=x_t.device)
        model_output = denoise(x_t, now, cond).to(x_t.dtype)
        x_t = step(model_output, x_t, now, torch.full_like(now, prev_timestep))
        if progress is not None:
            progress(done, len(pairs))
    return x_t
