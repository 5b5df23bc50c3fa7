"""The loop that samplers share: network, step, next timestep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from unclip.diffusion.guidance import Denoise
from unclip.diffusion.process import DiffusionProcess
from unclip.diffusion.respacing import step_pairs
from unclip.diffusion.samplers.base import Sampler, SamplerState
from unclip.utils.random import SampleGenerator

Progress = Callable[[int, int], None]
"""progress(steps done, steps in all), called after every step; all are those of the sample that takes the most."""

Settings = Callable[[list[int]], tuple[Sampler, Denoise[Any]]]
"""settings(rows) -> the sampler and the network of a batch of these samples, in this order."""


@torch.no_grad()
def run_steps(
    settings: Settings,
    x_T: torch.Tensor,
    timesteps: Sequence[Sequence[int]],
    process: DiffusionProcess,
    generator: SampleGenerator,
    cond: Any,
    progress: Progress | None,
) -> torch.Tensor:
    """x_start (B, ...), in the float type of `x_T` (B, ...), each sample through its own list of `timesteps`.

    All samples start together, and each leaves the batch after its last step, the one to the clean sample. A sample's
    noise is drawn from its own stream, one draw a step, so it does not depend on the others.

    Args:
        timesteps: B lists, strictly descending.
        cond: what the network takes; it has `.select(rows)` where the lists differ in length.
    """
    pairs = [step_pairs(steps, process.num_train_timesteps) for steps in timesteps]
    x_start, state, rows, done = torch.empty_like(x_T), SamplerState.start(x_T), list(range(len(pairs))), 0
    while rows:
        sampler, denoise = settings(rows)
        stochastic, stop = sampler.stochastic, min(len(pairs[row]) for row in rows)
        # (steps, n, 2) in one piece: no step has to wait for a copy to the device.
        stretch = torch.tensor([[pairs[row][step] for row in rows] for step in range(done, stop)], device=x_T.device)
        for now, before in zip(*stretch.unbind(dim=2), strict=True):
            model_output = denoise(state.x_t, now, cond).to(x_T.dtype)
            noise = generator.normal(tuple(x_T.shape[1:])).to(x_T.dtype) if stochastic else None
            state = sampler.step(process, model_output, state, now, before, noise)
            done += 1
            if progress is not None:
                progress(done, max(map(len, pairs)))
        leaving = [place for place, row in enumerate(rows) if len(pairs[row]) == stop]
        x_start[[rows[place] for place in leaving]] = state.x_t[leaving]
        staying = [place for place, row in enumerate(rows) if len(pairs[row]) > stop]
        if staying:
            kept = torch.tensor(staying, device=x_T.device)
            state, cond, generator = state.select(kept), cond.select(kept), generator.select(kept)
        rows = [rows[place] for place in staying]
    return x_start
