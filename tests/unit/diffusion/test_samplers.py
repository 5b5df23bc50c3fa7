"""Samplers with denoisers that are exact: moments, known limits, and what each step may depend on."""

from __future__ import annotations

import itertools

import pytest
import torch
from pydantic import ValidationError
from tests.support.gaussian import (
    MEAN,
    STD,
    CorrelatedDenoiser,
    GaussianDenoiser,
    Labels,
    advance,
    as_prediction,
    moments,
    process_of,
    rowwise,
    streams,
)

from unclip.config.base import ConfigError
from unclip.diffusion.process import DiffusionProcess
from unclip.diffusion.respacing import sampling_timesteps, step_pairs
from unclip.diffusion.samplers import DDIM, DDPM, DPMSolverPP, SamplerState, SamplingConfig
from unclip.utils.random import SampleGenerator

PREDICTIONS = ["epsilon", "sample", "v_prediction"]
SAMPLERS = {
    "ddpm": DDPM(),
    "ddim": DDIM(),
    "ddim eta": DDIM(0.6),
    "dpmsolver++": DPMSolverPP(),
    "sde-dpmsolver++": DPMSolverPP(stochastic=True),
}
CONFIGS = {
    "ddpm": SamplingConfig(num_inference_steps=6),
    "ddpm guided": SamplingConfig(num_inference_steps=6, guidance_scale=2.0),
    "ddim": SamplingConfig(sampler="ddim", num_inference_steps=6, timestep_spacing="trailing"),
    "ddim eta guided": SamplingConfig(sampler="ddim", num_inference_steps=6, eta=0.8, guidance_scale=2.0),
    "dpm guided": SamplingConfig(sampler="dpmsolver++", num_inference_steps=6, guidance_scale=2.0),
    "sde-dpm": SamplingConfig(sampler="sde-dpmsolver++", num_inference_steps=6, timestep_spacing="trailing"),
}


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("sampler", [*SAMPLERS.values(), DDIM(1.0)], ids=[*SAMPLERS, "ddim eta 1"])
def test_every_sampler_converges_to_the_datas_mean_and_covariance(schedule, sampler) -> None:
    """Exact moments; the error halves when the steps double, with DPM-Solver++ it is a quarter."""
    process = process_of(beta_schedule=schedule, prediction_type="v_prediction")
    mean = torch.tensor([0.7, -0.3], dtype=torch.float64)
    covariance = torch.tensor([[0.25, 0.12], [0.12, 0.09]], dtype=torch.float64)
    denoise = CorrelatedDenoiser(process, mean, covariance)
    errors = []
    for steps in (50, 100, 200):
        pairs = step_pairs(sampling_timesteps(1000, steps, "linspace"), 1000)
        found_mean, found = moments(sampler, process, denoise, pairs, dim=2)
        assert (found_mean - mean).abs().max() < 0.002  # linear: x_T is not quite N(0, 1) at T - 1
        errors.append(float((found - covariance).abs().max()))
    assert errors[-1] < 0.02
    factor = 4 if isinstance(sampler, DPMSolverPP) else 2
    assert all(coarse / fine > 0.8 * factor for coarse, fine in itertools.pairwise(errors)), errors


def assert_gaussian(samples: torch.Tensor, mean: float, std: float) -> None:
    """Within four standard errors of both moments."""
    samples = samples.double()
    count = samples.numel()
    assert abs(samples.mean() - mean) < 4 * std / count**0.5
    assert abs(samples.std() / std - 1) < 4 / (2 * count) ** 0.5


class WithExactVariance:
    """A network that also knows the variance of x_s given x_t, s being the timestep after t in its run."""

    def __init__(self, process: DiffusionProcess, timesteps: list[int]) -> None:
        self.process, self.denoise = process, GaussianDenoiser(process)
        self.previous = dict(step_pairs(timesteps, 1000))

    def __call__(self, x_t: torch.Tensor, timesteps: torch.Tensor, cond: Labels | None) -> torch.Tensor:
        values = {int(t): self.value(int(t)) for t in timesteps.unique()}
        values = rowwise(torch.tensor([values[t] for t in timesteps.tolist()]), x_t)
        return torch.cat([self.denoise(x_t, timesteps, cond), values.expand_as(x_t)], dim=1)

    def value(self, timestep: int) -> float:
        previous = self.previous[timestep]
        if previous < 0:
            return 0.0
        abar_t, abar_s = self.process.alphas_cumprod(torch.tensor([timestep, previous])).tolist()
        # Cov(x_s, x_t) = sqrt(abar_t / abar_s) Var(x_s), as x_t is x_s scaled plus noise.
        var_s, var_t = abar_s * STD**2 + 1 - abar_s, abar_t * STD**2 + 1 - abar_t
        exact = torch.tensor(var_s - (abar_t / abar_s) * var_s**2 / var_t)
        beta = torch.tensor(1 - abar_t / abar_s)
        low = (beta * (1 - abar_s) / (1 - abar_t)).log()
        return float(2 * (exact.log() - low) / (beta.log() - low) - 1)


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("steps", [4, 25])
def test_ancestral_sampling_with_the_exact_variance_is_exact(schedule, prediction_type, steps) -> None:
    """The exact mean and learned variance of every step give the data's distribution in any number of steps.

    Only the last step's variance is missing (none is added there), and x_T is not quite N(0, 1) at T - 1 when linear.
    """
    process = process_of(beta_schedule=schedule, prediction_type=prediction_type, variance_type="learned_range")
    config = SamplingConfig(num_inference_steps=steps)
    denoise = WithExactVariance(process, config.timesteps(1000))
    generator = streams(512)
    samples = config.sample(denoise, generator.normal((6, 2, 2)), process, generator, None)
    assert_gaussian(samples, MEAN, STD)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_fixed_variances_bound_the_exact_one(variance_type) -> None:
    """From below and above; with many steps both come near it."""
    process = process_of(variance_type=variance_type, prediction_type="v_prediction")
    denoise = CorrelatedDenoiser(process, torch.full((1,), MEAN), torch.full((1, 1), STD**2, dtype=torch.float64))
    errors = []
    for steps in (10, 100):
        pairs = step_pairs(sampling_timesteps(1000, steps, "linspace"), 1000)
        _, variance = moments(DDPM(), process, denoise, pairs, dim=1)
        std = float(variance.sqrt())
        errors.append(std / STD - 1 if variance_type == "fixed_large" else 1 - std / STD)
    assert 0 < errors[1] < errors[0] / 5


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_drawn_samples_have_the_moments_of_the_steps(config) -> None:
    """Noise comes in where the steps expect it: statistics of real draws against the exact moments."""
    process = process_of(prediction_type="sample")
    config = config.merged({"guidance_scale": 1.0})
    generator = streams(1024)
    samples = config.sample(GaussianDenoiser(process), generator.normal((12,)), process, generator, None)
    denoise = CorrelatedDenoiser(process, torch.full((1,), MEAN), torch.full((1, 1), STD**2, dtype=torch.float64))
    sampler = {"ddpm": DDPM(), "ddim": DDIM(config.eta)}.get(config.sampler) or DPMSolverPP(config.sampler[0] == "s")
    pairs = step_pairs(config.timesteps(1000), 1000)
    mean, variance = moments(sampler, process, denoise, pairs, dim=1)
    assert_gaussian(samples, float(mean), float(variance.sqrt()))


def test_ddim_with_eta_1_is_ddpm_with_the_small_variance() -> None:
    """DDIM section 4.1, for any pair of timesteps."""
    process = process_of(clip_sample_range=1.0)
    output, x_t, noise = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    timesteps, previous = torch.tensor([999, 500, 20, 0]), torch.tensor([500, 499, 3, -1])
    torch.testing.assert_close(
        advance(DDIM(1.0), process, output, x_t, timesteps, previous, noise),
        advance(DDPM(), process, output, x_t, timesteps, previous, noise),
    )


def test_the_first_order_step_of_dpm_solver_is_ddim() -> None:
    """Lu et al. 2022, section 4.1: with no history DPM-Solver++ is DDIM, and its SDE form has the posterior's variance."""
    process = process_of(clip_sample_range=1.0)
    output, x_t, noise = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = process, output, x_t, torch.tensor([999, 500, 20, 0]), torch.tensor([500, 499, 3, -1])
    torch.testing.assert_close(advance(DPMSolverPP(), *step), advance(DDIM(), *step))
    torch.testing.assert_close(advance(DPMSolverPP(stochastic=True), *step, noise), advance(DDPM(), *step, noise))


@pytest.mark.parametrize(
    ("config", "depends"),
    [
        (SamplingConfig(num_inference_steps=6), True),
        (SamplingConfig(sampler="ddim", num_inference_steps=6, eta=0.5), True),
        (SamplingConfig(sampler="ddim", num_inference_steps=6), False),
        (SamplingConfig(sampler="dpmsolver++", num_inference_steps=6), False),
        (SamplingConfig(sampler="sde-dpmsolver++", num_inference_steps=6), True),
    ],
)
def test_which_samplers_draw_noise(config, depends) -> None:
    process = process_of()
    x_T = streams(4).normal((5,))
    labels = Labels(torch.zeros(4))
    first, second = (
        config.sample(GaussianDenoiser(process), x_T, process, streams(4, seed), labels) for seed in (1, 2)
    )
    assert torch.equal(first, second) != depends


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS.values() if s.stochastic])
def test_stochastic_steps_need_noise(sampler) -> None:
    x, t = torch.zeros(1, 2), torch.tensor([5])
    with pytest.raises(ValueError, match="needs noise"):
        advance(sampler, process_of(), x, x, t, t - 1, None)


def test_a_guided_sample_is_moved_away_from_the_unconditional_data() -> None:
    """With means m and 0, guidance by s is the exact denoiser of mean s m; s = 0 is that of mean 0."""
    process = process_of(prediction_type="sample")
    x_T = streams(3).normal((5,))

    def sample(scale: float, labels: list[float]) -> torch.Tensor:
        config = SamplingConfig(sampler="ddim", num_inference_steps=20, guidance_scale=scale)
        return config.sample(GaussianDenoiser(process), x_T, process, streams(3), Labels(torch.tensor(labels)))

    torch.testing.assert_close(sample(3.0, [0.1, 0.2, -0.3]), sample(1.0, [0.3, 0.6, -0.9]))
    torch.testing.assert_close(sample(0.0, [0.1, 0.2, -0.3]), sample(1.0, [0.0, 0.0, 0.0]))


def test_guidance_in_an_interval_of_the_timesteps() -> None:
    """The unconditional half is computed where guidance is on, and nowhere else."""
    process = process_of(prediction_type="sample")
    sizes = {}

    def denoise(x_t: torch.Tensor, timesteps: torch.Tensor, cond: Labels) -> torch.Tensor:
        sizes[int(timesteps[0])] = len(x_t)
        return GaussianDenoiser(process)(x_t, timesteps, cond)

    config = SamplingConfig(num_inference_steps=11, guidance_scale=3.0, guidance_interval=(0.2, 0.6))
    config.sample(denoise, streams(2).normal((5,)), process, streams(2), Labels(torch.ones(2)))
    assert len(sizes) == 11
    assert {t for t, size in sizes.items() if size == 4} == {t for t in sizes if 200 <= t < 600}
    whole = config.merged({"guidance_interval": [0.0, 1.0]})
    whole.sample(denoise, streams(2).normal((5,)), process, streams(2), Labels(torch.ones(2)))
    assert set(sizes.values()) == {4}


def test_a_guided_run_keeps_the_learned_variance() -> None:
    """The process decides whether the network's second half is a variance: it must not be extrapolated."""
    process = process_of(variance_type="learned_range")
    seen = []

    def denoise(x_t: torch.Tensor, timesteps: torch.Tensor, cond: Labels) -> torch.Tensor:
        seen.append(x_t.shape[0])
        values = torch.where(cond.values == 0, -1.0, 0.0)[:, None].expand_as(x_t)
        return torch.cat([torch.zeros_like(x_t), values], dim=1)

    guided, alone = (
        SamplingConfig(num_inference_steps=3, guidance_scale=scale).sample(
            denoise, torch.zeros(2, 4), process, streams(2), Labels(torch.ones(2))
        )
        for scale in (2.0, 1.0)
    )
    assert torch.equal(guided, alone)
    assert seen == [4, 4, 4, 2, 2, 2]


def test_a_learned_variance_stays_within_its_bounds() -> None:
    """Where the bounds nearly touch, as between neighbouring steps, training does not hold it there; long steps need it."""
    process = process_of(variance_type="learned_range")

    def sample(value: float) -> torch.Tensor:
        def denoise(x_t: torch.Tensor, timesteps: torch.Tensor, cond: object) -> torch.Tensor:
            return torch.cat([torch.zeros_like(x_t), torch.full_like(x_t, value)], dim=1)

        return SamplingConfig(num_inference_steps=5).sample(denoise, torch.zeros(2, 4), process, streams(2), None)

    assert torch.equal(sample(15.0), sample(1.0))
    assert torch.equal(sample(-15.0), sample(-1.0))
    assert not torch.allclose(sample(1.0), sample(-1.0))


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_conditions_are_prepared_once_for_all_steps(guidance_scale) -> None:
    """What the network gets is what `prepare` made, and it makes it once, for both halves of the guidance."""
    process = process_of(prediction_type="sample")
    exact, calls = GaussianDenoiser(process), []

    def prepare(cond: Labels) -> Labels:
        calls.append(cond.batch_size)
        return Labels(10 * cond.values)

    config = SamplingConfig(sampler="ddim", num_inference_steps=5, guidance_scale=guidance_scale)
    x_T = streams(2).normal((3,))
    prepared = config.sample(exact, x_T, process, streams(2), Labels(torch.tensor([0.1, 0.2])), prepare=prepare)
    assert calls == ([2] if guidance_scale == 1 else [4])
    raw = config.sample(exact, x_T, process, streams(2), Labels(torch.tensor([1.0, 2.0])))
    torch.testing.assert_close(prepared, raw)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmsolver++", "sde-dpmsolver++"])
def test_first_step_at_the_noisiest_last_step_gives_x_start(sampler) -> None:
    process = process_of(prediction_type="sample")
    visited = []

    def denoise(x_t: torch.Tensor, timesteps: torch.Tensor, cond: None) -> torch.Tensor:
        visited.append(timesteps.tolist())
        return torch.full_like(x_t, 0.25 * len(visited))

    counts = []
    config = SamplingConfig(sampler=sampler, num_inference_steps=4)
    samples = config.sample(
        denoise, torch.zeros(2, 3), process, streams(2), None, progress=lambda done, total: counts.append((done, total))
    )
    assert visited == [[999, 999], [666, 666], [333, 333], [0, 0]]
    assert counts == [(1, 4), (2, 4), (3, 4), (4, 4)]
    torch.testing.assert_close(samples, torch.full((2, 3), 1.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("num_train_timesteps", [1, 1000])
def test_a_single_step_gives_the_predicted_x_start(sampler, num_train_timesteps) -> None:
    process = process_of(num_train_timesteps=num_train_timesteps, clip_sample_range=1.0)
    x_T = streams(8).normal((5,))
    denoise = GaussianDenoiser(process)
    config = SamplingConfig(sampler=sampler, num_inference_steps=1)
    samples = config.sample(denoise, x_T, process, streams(8), None)
    abar = process.alphas_cumprod(torch.tensor(num_train_timesteps - 1)).float()
    expected = denoise.x_start(x_T, abar, MEAN).clamp(-1, 1)
    torch.testing.assert_close(samples, expected, rtol=0, atol=5e-3)  # eps / sqrt(abar) loses digits in float32


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_steps_from_pure_noise_and_to_the_clean_sample_are_finite(sampler) -> None:
    """abar is 0 at t = T and 1 at t = -1: log(alpha / sigma) is infinite at both."""
    process = process_of(prediction_type="sample")
    x_start, x_t, noise = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noisiest = torch.full((4,), 1000)
    start = sampler.step(process, x_start, SamplerState.start(x_t), noisiest, noisiest - 300, noise)
    assert start.x_t.isfinite().all()
    second = sampler.step(process, x_start, start, noisiest - 300, noisiest - 600, noise)
    assert second.x_t.isfinite().all()
    clean = sampler.step(process, x_start, second, noisiest - 600, torch.full((4,), -1), noise)
    torch.testing.assert_close(clean.x_t, x_start)


def test_no_gradients_and_the_float_type_is_kept() -> None:
    process = process_of()
    weight = torch.ones((), requires_grad=True)
    x_T = torch.zeros(2, 3)

    def denoise(x_t: torch.Tensor, timesteps: torch.Tensor, cond: None) -> torch.Tensor:
        assert x_t.dtype == torch.float32
        return (weight * x_t).bfloat16()

    for config in CONFIGS.values():
        samples = config.merged({"guidance_scale": 1.0}).sample(denoise, x_T, process, streams(2), None)
        assert not samples.requires_grad
        assert samples.dtype == torch.float32
    assert torch.equal(x_T, torch.zeros(2, 3))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_bfloat16_network_is_sampled_in_float32(config) -> None:
    """Outputs in bfloat16 give what the same numbers in float32 give: nothing is computed in the smaller type."""
    process = process_of(prediction_type="sample", clip_sample_range=0.7)
    exact = GaussianDenoiser(process)
    x_T = streams(4).normal((5,))
    labels = Labels(torch.tensor([0.5, -0.5, 0.1, 0.9]))
    samples = [
        config.sample(lambda *a, dtype=dtype: exact(*a).bfloat16().to(dtype), x_T, process, streams(4), labels)
        for dtype in (torch.bfloat16, torch.float32)
    ]
    assert torch.equal(*samples)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps = 0"),
        ({"sampler": "plms"}, "sampler = 'plms'"),
        ({"timestep_spacing": "even"}, "timestep_spacing = 'even'"),
        ({"guidance_scale": -1.0}, "guidance_scale = -1.0"),
        ({"guidance_interval": [0.9, 0.2]}, r"guidance_interval must rise within 0\.\.1, but is \[0\.9, 0\.2\]"),
        ({"guidance_interval": [0.5, 1.2]}, r"guidance_interval must rise within 0\.\.1, but is \[0\.5, 1\.2\]"),
        ({"sampler": "ddim", "eta": 1.5}, "eta = 1.5"),
        ({"sampler": "ddpm", "eta": 0.5}, "eta = 0.5 is a setting of sampler ddim, not of ddpm"),
        ({"timesteps_list": [9, 5, 0]}, "timesteps_list has 3 timesteps, but num_inference_steps = 250"),
    ],
)
def test_bad_settings_are_refused(settings, message) -> None:
    with pytest.raises(ValidationError):
        SamplingConfig(**settings)
    with pytest.raises(ConfigError, match=message):
        SamplingConfig.from_dict(settings)


def test_timesteps_that_the_process_does_not_have_are_refused() -> None:
    config = SamplingConfig(num_inference_steps=11)
    process = process_of(num_train_timesteps=10)
    with pytest.raises(ValueError, match="num_inference_steps must be between 1 and num_train_timesteps = 10, not 11"):
        config.sample(GaussianDenoiser(process), torch.zeros(1, 2), process, streams(1), None)
    assert config.merged({"num_inference_steps": 3}).timesteps(10) == [9, 4, 0]
    explicit = SamplingConfig(num_inference_steps=3, timesteps_list=(9, 7, 2))
    assert explicit.timesteps(10) == [9, 7, 2]
    with pytest.raises(ValueError, match=r"timesteps_list must be strictly descending and in 0\.\.8, not \[9, 7, 2\]"):
        explicit.timesteps(9)


def test_an_explicit_list_is_the_only_source_of_the_timesteps() -> None:
    """The steps between them follow from the list, whatever its gaps: the same as by hand."""
    process = process_of()
    denoise, x_T = GaussianDenoiser(process), streams(3).normal((4,)).double()
    config = SamplingConfig(sampler="ddim", num_inference_steps=3, timesteps_list=(990, 700, 13))
    x_t = x_T
    for now, before in itertools.pairwise([990, 700, 13, -1]):
        t, s = torch.full((3,), now), torch.full((3,), before)
        x_start = GaussianDenoiser(process).x_start(x_t, process.alphas_cumprod(t)[:, None], MEAN)
        noise = as_prediction(process, x_start, x_t, t)
        x_t = process.q_sample(x_start, s, noise)
    torch.testing.assert_close(config.sample(denoise, x_T, process, SampleGenerator(torch.arange(3)), None), x_t)
