"""DDIM's inversion and DPM-Solver++, with its SDE form, against diffusers' schedulers.

The tables of the inverse scheduler are float32; given float64 ones, agreement is to float64 rounding. DPM-Solver++ is
float32 inside whatever its tables are.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMInverseScheduler, DPMSolverMultistepScheduler
from tests.support.gaussian import advance

from unclip.diffusion.process import DiffusionConfig
from unclip.diffusion.respacing import sampling_timesteps, step_pairs
from unclip.diffusion.samplers import DDIM, DPMSolverPP, SamplerState, ddim_invert
from unclip.diffusion.schedules import beta_schedule

SHAPE = (2, 3, 4, 4)
SCHEDULES = ["linear", "squaredcos_cap_v2"]
PREDICTIONS = ["epsilon", "sample", "v_prediction"]


def with_float64_tables(scheduler, betas: torch.Tensor):
    scheduler.betas = betas
    scheduler.alphas = 1 - betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(dim=0)
    return scheduler


def draws() -> tuple[torch.Tensor, torch.Tensor]:
    """(model_output, x_t), float64."""
    return tuple(torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def at(timestep: int) -> torch.Tensor:
    return torch.full((SHAPE[0],), timestep)


def inverse_scheduler(schedule: str, prediction_type: str, steps: int) -> DDIMInverseScheduler:
    scheduler = DDIMInverseScheduler(beta_schedule=schedule, prediction_type=prediction_type, clip_sample=False)
    scheduler = with_float64_tables(scheduler, beta_schedule(schedule, 1000))
    scheduler.initial_alpha_cumprod = torch.ones((), dtype=torch.float64)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_ddim_inversion_step(schedule, prediction_type) -> None:
    """Between any two timesteps; their timestep is the later of the two."""
    process = DiffusionConfig(beta_schedule=schedule, prediction_type=prediction_type).build()
    scheduler = inverse_scheduler(schedule, prediction_type, steps=20)
    model_output, x_t = draws()
    for timestep in scheduler.timesteps.tolist()[1:]:
        theirs = scheduler.step(model_output, timestep, x_t).prev_sample
        ours = advance(DDIM(), process, model_output, x_t, at(timestep - 50), at(timestep))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_whole_inversion(schedule) -> None:
    """From the clean sample to x_T with the same outputs of the network, step by step."""
    process = DiffusionConfig(beta_schedule=schedule, prediction_type="epsilon").build()
    scheduler = inverse_scheduler(schedule, "epsilon", steps=20)
    outputs = torch.randn(20, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, x_start = draws()
    theirs, replay = x_start, iter(outputs)
    for output, timestep in zip(outputs, scheduler.timesteps.tolist(), strict=True):
        theirs = scheduler.step(output, timestep, theirs).prev_sample
    timesteps = sampling_timesteps(1000, 20, "leading")
    ours = ddim_invert(lambda x_t, t, cond: next(replay), x_start, timesteps, process, None)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("steps", [1, 2, 10, 40])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_dpm_solver_run(algorithm, prediction_type, schedule, steps, spacing) -> None:
    """A run from x_T to the clean sample with the same outputs of the network and the same noise, step by step."""
    process = DiffusionConfig(beta_schedule=schedule, prediction_type=prediction_type, dynamic_threshold=0.995).build()
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule=schedule,
        prediction_type=prediction_type,
        algorithm_type=algorithm,
        thresholding=True,
        dynamic_thresholding_ratio=0.995,
        sample_max_value=float("inf"),
    )
    scheduler = with_float64_tables(scheduler, beta_schedule(schedule, 1000))
    timesteps = sampling_timesteps(1000, steps, spacing)
    scheduler.set_timesteps(timesteps=timesteps)
    sampler = DPMSolverPP(stochastic=algorithm == "sde-dpmsolver++")
    generator = torch.Generator().manual_seed(0)
    theirs = torch.randn(SHAPE, generator=generator)
    state = SamplerState.start(theirs.double())
    for timestep, previous in step_pairs(timesteps, 1000):
        output, noise = torch.randn(2, *SHAPE, generator=generator)
        theirs = scheduler.step(output, timestep, theirs, variance_noise=noise).prev_sample
        state = sampler.step(process, output.double(), state, at(timestep), at(previous), noise.double())
        torch.testing.assert_close(state.x_t, theirs.double(), rtol=1e-5, atol=1e-5)
