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
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr as theirs_rescaled

from unclip.diffusion.process import DiffusionConfig, DiffusionProcess
from unclip.diffusion.respacing import sampling_timesteps, step_pairs
from unclip.diffusion.samplers import DDIM, DDPM, SamplerState
from unclip.diffusion.schedules import beta_schedule, rescale_zero_terminal_snr

SHAPE = (2, 3, 4, 4)
SCHEDULES = {"linear": (0.0001, 0.02), "scaled_linear": (0.00085, 0.012), "squaredcos_cap_v2": (0.0001, 0.02)}
"""The betas at both ends, which the schedulers take as settings."""
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


def ddpm_step(process: DiffusionProcess, model_output, x_t, timestep: int, previous: int, noise) -> torch.Tensor:
    return DDPM().step(process, model_output, SamplerState.start(x_t), at(timestep), at(previous), noise).x_t


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
        ours = ddpm_step(process, model_output, x_t, timestep, previous, noise)
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
        state = SamplerState.start(x_t)
        ours = DDIM(eta).step(process, model_output, state, at(timestep), at(previous), noise if eta else None).x_t
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
        ours = ddpm_step(process, model_output, x_t, timestep, previous, noise)
        # Their float32 tables return 0.99947 x_start at t = 0, and lose digits of 1 - beta at t = 999.
        tolerance = 1e-9 if exact else {0: 2e-3, 999: 2e-4}.get(timestep, 2e-5)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
        double = [x.double() for x in (model_output, x_t, noise)]
        in_double = ddpm_step(process, *double[:2], timestep, previous, double[2])
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


def scheduler_of(schedule: str, **settings) -> DDPMScheduler:
    start, end = SCHEDULES[schedule]
    return DDPMScheduler(beta_schedule=schedule, beta_start=start, beta_end=end, **settings)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule) -> None:
    theirs = scheduler_of(schedule).betas.double()
    torch.testing.assert_close(beta_schedule(schedule, 1000), theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_zero_terminal_snr(schedule) -> None:
    """Their function in float64, and their scheduler as it is."""
    betas = beta_schedule(schedule, 1000)
    expected = (1 - theirs_rescaled(betas)).cumprod(dim=0)
    torch.testing.assert_close(rescale_zero_terminal_snr((1 - betas).cumprod(dim=0)), expected, rtol=1e-9, atol=1e-15)
    process = DiffusionConfig(beta_schedule=schedule, zero_terminal_snr=True, prediction_type="sample").build()
    scheduler = scheduler_of(schedule, rescale_betas_zero_snr=True)
    ours = process.alphas_cumprod(torch.arange(1000))
    torch.testing.assert_close(ours, scheduler.alphas_cumprod.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddpm_step_with_zero_terminal_snr(fixed_noise, schedule, variance_type, prediction_type) -> None:
    """From pure noise at T - 1 on."""
    process = DiffusionConfig(
        beta_schedule=schedule, zero_terminal_snr=True, prediction_type=prediction_type, variance_type=variance_type
    ).build()
    scheduler = scheduler_of(schedule, prediction_type=prediction_type, variance_type=variance_type, clip_sample=False)
    scheduler = with_float64_tables(scheduler, theirs_rescaled(beta_schedule(schedule, 1000)))
    timesteps = sampling_timesteps(1000, 10, "linspace")  # ends at 0: above it theirs adds noise to the clean sample
    scheduler.set_timesteps(timesteps=timesteps)
    model_output, x_t, noise = draws(learned=variance_type == "learned_range", dtype=torch.float64)
    fixed_noise(noise)
    for timestep, previous in step_pairs(timesteps, 1000):
        theirs = scheduler.step(model_output, timestep, x_t).prev_sample
        ours = ddpm_step(process, model_output, x_t, timestep, previous, noise)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_unclip_variances() -> None:
    """The deviations and log variances of UnCLIPScheduler from t - 1 to t, in its own float32; none at t = 0 in ours."""
    scheduler = UnCLIPScheduler(variance_type="fixed_small_log")
    deviations = [float(scheduler._get_variance(t)) for t in (0, 487, 999)]
    assert deviations == pytest.approx([1e-10, 0.0549625, 0.9994987], rel=1e-5)
    x, timesteps = torch.zeros(2, 1), torch.tensor([487, 999])
    ours = DiffusionConfig().build().model_log_variance(None, x, timesteps, timesteps - 1)
    assert (ours / 2).exp()[:, 0].tolist() == pytest.approx(deviations[1:], rel=1e-5)
    step = ddpm_step(
        DiffusionConfig(prediction_type="sample").build(),
        torch.ones(SHAPE),
        torch.zeros(SHAPE),
        0,
        -1,
        torch.full(SHAPE, 1e6),
    )
    assert torch.equal(step, torch.ones(SHAPE))
    scheduler = UnCLIPScheduler(variance_type="learned_range")
    values = torch.full((3, 1), 0.5)
    theirs = [float(scheduler._get_variance(t, predicted_variance=values[0])) for t in (1, 487, 999)]
    assert theirs == pytest.approx([-10.1712790, -5.7998052, -0.0010011], rel=2e-4)
    timesteps = torch.tensor([1, 487, 999])
    process = DiffusionConfig(variance_type="learned_range").build()
    log_variance = process.model_log_variance(values, torch.zeros(3, 1), timesteps, timesteps - 1)
    assert log_variance[:, 0].tolist() == pytest.approx(theirs, rel=2e-4)


@pytest.mark.parametrize("count", [2, 7, 25, 50, 64, 100, 250, 1000])
def test_timesteps_are_unclips(count) -> None:
    scheduler = UnCLIPScheduler()
    scheduler.set_timesteps(count)
    assert sampling_timesteps(1000, count, "linspace") == scheduler.timesteps.tolist()
