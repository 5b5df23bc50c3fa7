"""Steps and timestep lists against diffusers' DDPM, DDIM and UnCLIP schedulers.

Their tables are float32. Where the schedulers are given float64 tables, agreement is to float64 rounding; the
schedulers as they are agree to what their rounding allows.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UnCLIPScheduler
from diffusers.schedulers import scheduling_ddpm, scheduling_unclip

from unclip.diffusion.process import DiffusionConfig
from unclip.diffusion.respacing import sampling_timesteps, step_pairs
from unclip.diffusion.samplers import ddim_step, ddpm_step
from unclip.diffusion.schedules import beta_schedule

SHAPE = (2, 3, 4, 4)
UNCLIP_CONFIGS = {
    "prior": {"prediction_type": "sample", "variance_type": "fixed_small", "clip_sample_range": 5.0},
    "decoder": {"prediction_type": "epsilon", "variance_type": "learned_range", "clip_sample_range": 1.0},
    "upsampler": {"prediction_type": "epsilon", "variance_type": "fixed_small", "clip_sample_range": 1.0},
}


def with_float64_tables(scheduler, betas: torch.Tensor):
    scheduler.betas = betas
    scheduler.alphas = 1 - betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(dim=0)
    scheduler.one = scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    return scheduler


def draws(*, learned: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(model_output, x_t, noise)."""
    generator = torch.Generator().manual_seed(0)
    output, variance_values, x_t, noise = torch.randn(4, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    return torch.cat([output, variance_values.clamp(-1, 1)], dim=1) if learned else output, x_t, noise


def at(timestep: int) -> torch.Tensor:
    return torch.full((SHAPE[0],), timestep)


@pytest.fixture
def fixed_noise(monkeypatch):
    """Makes the schedulers draw this noise."""

    def fix(noise: torch.Tensor) -> None:
        for module in (scheduling_ddpm, scheduling_unclip):
            monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: noise)

    return fix


@pytest.mark.parametrize("steps", [25, 7, 1000])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm_step(fixed_noise, steps, schedule, prediction_type, variance_type) -> None:
    process = DiffusionConfig(
        beta_schedule=schedule, prediction_type=prediction_type, variance_type=variance_type, clip_sample_range=1.0
    ).build()
    scheduler = DDPMScheduler(beta_schedule=schedule, prediction_type=prediction_type, variance_type=variance_type)
    scheduler = with_float64_tables(scheduler, beta_schedule(schedule, 1000))
    timesteps = sampling_timesteps(1000, steps, "linspace")
    scheduler.set_timesteps(timesteps=timesteps)
    model_output, x_t, noise = draws(learned=variance_type == "learned_range", dtype=torch.float64)
    fixed_noise(noise)
    for timestep, previous in step_pairs(timesteps, 1000)[:: max(1, steps // 25)]:
        theirs = scheduler.step(model_output, timestep, x_t).prev_sample
        ours = ddpm_step(process, model_output, x_t, at(timestep), at(previous), noise)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clip_sample_range", [None, 1.0])
def test_ddim_step(eta, schedule, prediction_type, clip_sample_range) -> None:
    """On its own grid (leading, T divisible by N), where its rule for the previous step is right."""
    process = DiffusionConfig(
        beta_schedule=schedule, prediction_type=prediction_type, clip_sample_range=clip_sample_range
    ).build()
    scheduler = DDIMScheduler(
        beta_schedule=schedule, prediction_type=prediction_type, clip_sample=clip_sample_range is not None
    )
    scheduler = with_float64_tables(scheduler, beta_schedule(schedule, 1000))
    scheduler.set_timesteps(20)
    timesteps = sampling_timesteps(1000, 20, "leading")
    assert timesteps == scheduler.timesteps.tolist()
    model_output, x_t, noise = draws(learned=False, dtype=torch.float64)
    for timestep, previous in step_pairs(timesteps, 1000):
        theirs = scheduler.step(
            model_output, timestep, x_t, eta=eta, use_clipped_model_output=True, variance_noise=noise if eta else None
        ).prev_sample
        ours = ddim_step(process, model_output, x_t, at(timestep), at(previous), noise if eta else None, eta=eta)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [25, 7])
@pytest.mark.parametrize("stage", UNCLIP_CONFIGS)
@pytest.mark.parametrize("exact", [True, False], ids=["float64 tables", "float32"])
def test_unclip_step(fixed_noise, steps, stage, exact) -> None:
    """The three schedulers of the published unCLIP pipelines."""
    config = UNCLIP_CONFIGS[stage]
    process = DiffusionConfig(**config).build()
    learned = config["variance_type"] == "learned_range"
    scheduler = UnCLIPScheduler(
        prediction_type=config["prediction_type"],
        variance_type="learned_range" if learned else "fixed_small_log",
        clip_sample_range=config["clip_sample_range"],
    )
    dtype = torch.float64 if exact else torch.float32
    if exact:
        scheduler = with_float64_tables(scheduler, beta_schedule("squaredcos_cap_v2", 1000))
    scheduler.set_timesteps(steps)
    timesteps = sampling_timesteps(1000, steps, "linspace")
    assert timesteps == scheduler.timesteps.tolist()
    model_output, x_t, noise = draws(learned=learned, dtype=dtype)
    fixed_noise(noise)
    for timestep, previous in step_pairs(timesteps, 1000):
        theirs = scheduler.step(
            model_output, timestep, x_t, prev_timestep=None if previous < 0 else previous
        ).prev_sample
        ours = ddpm_step(process, model_output, x_t, at(timestep), at(previous), noise)
        # Their float32 tables return 0.99947 x_start at t = 0, and lose digits of 1 - beta at t = 999.
        tolerance = 1e-9 if exact else {0: 2e-3, 999: 2e-4}.get(timestep, 2e-5)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
        double = [x.double() for x in (model_output, x_t, noise)]
        in_double = ddpm_step(process, *double[:2], at(timestep), at(previous), double[2])
        torch.testing.assert_close(ours.double(), in_double, rtol=0, atol=1e-6)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_timestep_lists(spacing) -> None:
    """Every length but one: a single linspace step is at the clean end in theirs."""
    scheduler = DDPMScheduler(timestep_spacing=spacing)
    for steps in range(2 if spacing == "linspace" else 1, 1001):
        scheduler.set_timesteps(steps)
        # Theirs may have one too many when trailing, for the same rounding of its step.
        pairs = zip(sampling_timesteps(1000, steps, spacing), scheduler.timesteps.tolist()[:steps], strict=True)
        for i, (ours, theirs) in enumerate(pairs):
            if ours != theirs:
                # Theirs loses some halves to the rounding of its step: 13 * 999 / 26 = 499.5 is 499 there, 500 here.
                exact = Fraction(i * 999, steps - 1) if spacing == "linspace" else Fraction(i * 1000, steps)
                assert exact.denominator == 2, (steps, ours, theirs)
                assert abs(ours - theirs) == 1, (steps, ours, theirs)


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_q_sample_and_velocity(schedule) -> None:
    process = DiffusionConfig(beta_schedule=schedule, prediction_type="v_prediction").build()
    scheduler = with_float64_tables(DDPMScheduler(beta_schedule=schedule), beta_schedule(schedule, 1000))
    x_start, noise, _ = draws(learned=False, dtype=torch.float64)
    timesteps = torch.tensor([3, 871])
    theirs = scheduler.add_noise(x_start, noise, timesteps), scheduler.get_velocity(x_start, noise, timesteps)
    ours = process.q_sample(x_start, timesteps, noise), process.target(x_start, noise, timesteps)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_schedules(schedule) -> None:
    theirs = DDPMScheduler(beta_schedule=schedule).betas.double()
    torch.testing.assert_close(beta_schedule(schedule, 1000), theirs, rtol=1e-6, atol=1e-8)
