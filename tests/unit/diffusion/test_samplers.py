"""Samplers with denoisers that are exact: Gaussian data, for which every conditional distribution has a closed form.

Data N(MEAN, STD^2) gives x_t ~ N(sqrt(abar) MEAN, abar STD^2 + 1 - abar), and x_start given x_t is Gaussian too.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from pydantic import ValidationError

from unclip.config.base import ConfigError
from unclip.diffusion.process import DiffusionConfig, DiffusionProcess
from unclip.diffusion.respacing import sampling_timesteps
from unclip.diffusion.samplers import SamplingConfig, ddim_step, ddpm_step, sample_ddim, sample_ddpm
from unclip.utils.random import SampleGenerator

MEAN, STD = 0.7, 0.4
PREDICTIONS = ["epsilon", "sample", "v_prediction"]


@dataclass(frozen=True)
class Labels:
    """(B,) means of the data of each sample; the unconditional data has mean 0."""

    values: torch.Tensor

    def unconditional(self) -> Labels:
        return Labels(torch.zeros_like(self.values))

    def cat(self, other: Labels) -> Labels:
        return Labels(torch.cat([self.values, other.values]))


class GaussianDenoiser:
    """The network that training would end with for data N(mean, STD^2), `mean` being MEAN or the sample's label."""

    def __init__(self, process: DiffusionProcess) -> None:
        self.process = process
        self.previous = {}

    def x_start(self, x_t: torch.Tensor, abar: torch.Tensor, mean: float | torch.Tensor) -> torch.Tensor:
        """E[x_start | x_t] by the regression of jointly Gaussian variables."""
        gain = abar.sqrt() * STD**2 / (abar * STD**2 + 1 - abar)
        return mean + gain * (x_t - abar.sqrt() * mean)

    def __call__(self, x_t: torch.Tensor, timesteps: torch.Tensor, cond: Labels | None) -> torch.Tensor:
        broadcast = (-1, *[1] * (x_t.ndim - 1))
        abar = self.process.alphas_cumprod(timesteps).to(x_t.dtype).reshape(broadcast)
        x_start = self.x_start(x_t, abar, MEAN if cond is None else cond.values.reshape(broadcast))
        noise = (x_t - abar.sqrt() * x_start) / (1 - abar).sqrt()
        prediction = {
            "epsilon": noise,
            "sample": x_start,
            "v_prediction": abar.sqrt() * noise - (1 - abar).sqrt() * x_start,
        }[self.process.config.prediction_type]
        if self.process.config.variance_type != "learned_range":
            return prediction
        value = self.variance_value(int(timesteps[0]))  # the samplers take a whole batch through the same timesteps
        return torch.cat([prediction, torch.full_like(x_t, value)], dim=1)

    def variance_value(self, timestep: int) -> float:
        """What the network says for the exact variance of x_s given x_t, s being the timestep after t in the run."""
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


def process_of(**settings) -> DiffusionProcess:
    return DiffusionConfig(**settings).build()


def streams(count: int, seed: int = 0) -> SampleGenerator:
    return SampleGenerator.for_samples(seed, torch.arange(count))


def assert_gaussian(samples: torch.Tensor, mean: float, std: float) -> None:
    """Within four standard errors of both moments."""
    samples = samples.double()
    count = samples.numel()
    assert abs(samples.mean() - mean) < 4 * std / count**0.5
    assert abs(samples.std() / std - 1) < 4 / (2 * count) ** 0.5


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("steps", [4, 25])
def test_ancestral_sampling_with_the_exact_variance_is_exact(schedule, prediction_type, steps) -> None:
    """The exact mean and learned variance of every step give the data's distribution in any number of steps.

    Only the last step's variance is missing (none is added there), and x_T is not quite N(0, 1) at T - 1 when linear.
    """
    process = process_of(beta_schedule=schedule, prediction_type=prediction_type, variance_type="learned_range")
    denoise = GaussianDenoiser(process)
    timesteps = sampling_timesteps(1000, steps, "linspace")
    denoise.previous = dict(zip(timesteps, [*timesteps[1:], -1], strict=True))
    generator = streams(2048)
    samples = sample_ddpm(denoise, generator.normal((3, 2, 2)), timesteps, process, generator, None)
    assert_gaussian(samples, MEAN, STD)


def ancestral_moments(process: DiffusionProcess, timesteps: list[int]) -> tuple[float, float]:
    """Mean and deviation of samples: each step is affine in x_t and adds known noise, so they follow a recursion."""
    denoise = GaussianDenoiser(process)
    mean, variance = 0.0, 1.0
    for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True):
        abar_t, abar_s = process.alphas_cumprod(torch.tensor([t, s]))
        beta = 1 - abar_t / abar_s
        intercept = denoise.x_start(torch.tensor(0.0), abar_t, MEAN)
        gain = denoise.x_start(torch.tensor(1.0), abar_t, MEAN) - intercept
        weight = abar_s.sqrt() * beta / (1 - abar_t)
        slope = weight * gain + (1 - beta).sqrt() * (1 - abar_s) / (1 - abar_t)
        small = process.config.variance_type == "fixed_small"
        noise = beta * ((1 - abar_s) / (1 - abar_t) if small else 1.0) if s >= 0 else 0.0
        mean, variance = float(weight * intercept + slope * mean), float(slope**2 * variance + noise)
    return mean, variance**0.5


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_ancestral_sampling_with_fixed_variances(variance_type, prediction_type) -> None:
    """They bound the exact variance from below and above; with many steps both come near it."""
    process = process_of(prediction_type=prediction_type, variance_type=variance_type)
    errors = []
    for steps in (10, 200):
        timesteps = sampling_timesteps(1000, steps, "linspace")
        mean, std = ancestral_moments(process, timesteps)
        generator = streams(2048)
        x_T = generator.normal((6,))
        samples = sample_ddpm(GaussianDenoiser(process), x_T, timesteps, process, generator, None)
        assert_gaussian(samples, mean, std)
        errors.append(std / STD - 1 if variance_type == "fixed_large" else 1 - std / STD)
    assert 0 < errors[1] < errors[0] / 5


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_ddim_approaches_the_probability_flow(schedule, prediction_type) -> None:
    """The flow keeps (x_t - mean) / deviation; a first-order solver's error halves when its steps double."""
    process = process_of(beta_schedule=schedule, prediction_type=prediction_type)
    x_T = torch.linspace(-3, 3, 50, dtype=torch.float64).reshape(50, 1)
    abar = process.alphas_cumprod(torch.tensor(999))
    exact = MEAN + STD * (x_T - abar.sqrt() * MEAN) / (abar * STD**2 + 1 - abar).sqrt()
    errors = []
    for steps in (50, 100, 200, 400):
        timesteps = sampling_timesteps(1000, steps, "linspace")
        samples = sample_ddim(GaussianDenoiser(process), x_T, timesteps, process, streams(50), None)
        errors.append(float((samples - exact).abs().max()))
    assert errors[-1] < 0.02
    assert all(1.7 < coarse / fine < 2.3 for coarse, fine in itertools.pairwise(errors)), errors


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_samples_the_data(eta) -> None:
    process = process_of()
    generator = streams(2048)
    timesteps = sampling_timesteps(1000, 250, "trailing")
    samples = sample_ddim(
        GaussianDenoiser(process), generator.normal((6,)), timesteps, process, generator, None, eta=eta
    )
    assert abs(samples.mean() - MEAN) < 0.02
    assert abs(samples.std() / STD - 1) < 0.03


def test_ddim_with_eta_1_is_ddpm_with_the_small_variance() -> None:
    """DDIM section 4.1, for any pair of timesteps."""
    process = process_of(clip_sample_range=1.0)
    output, x_t, noise = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    timesteps, previous = torch.tensor([999, 500, 20, 0]), torch.tensor([500, 499, 3, -1])
    torch.testing.assert_close(
        ddim_step(process, output, x_t, timesteps, previous, noise, eta=1.0),
        ddpm_step(process, output, x_t, timesteps, previous, noise),
    )


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_steps_take_each_sample_at_its_own_timestep(sampler, variance_type) -> None:
    process = process_of(variance_type=variance_type, dynamic_threshold=0.9)
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(4, 6 if variance_type == "learned_range" else 3, 4, 4, generator=generator)
    x_t, noise = torch.randn(2, 4, 3, 4, 4, generator=generator)
    timesteps, previous = torch.tensor([999, 500, 20, 0]), torch.tensor([700, 499, 3, -1])

    def step(rows: slice) -> torch.Tensor:
        arguments = process, output[rows], x_t[rows], timesteps[rows], previous[rows], noise[rows]
        return ddpm_step(*arguments) if sampler == "ddpm" else ddim_step(*arguments, eta=0.7)

    together = step(slice(None))
    for i in range(4):
        torch.testing.assert_close(together[i : i + 1], step(slice(i, i + 1)), rtol=0, atol=0)


CONFIGS = {
    "ddpm": SamplingConfig(num_inference_steps=6),
    "ddpm guided": SamplingConfig(num_inference_steps=6, guidance_scale=2.0),
    "ddim": SamplingConfig(sampler="ddim", num_inference_steps=6, timestep_spacing="trailing"),
    "ddim eta guided": SamplingConfig(sampler="ddim", num_inference_steps=6, eta=0.8, guidance_scale=2.0),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("shape", [(5,), (3, 4, 4)])
def test_a_sample_does_not_depend_on_its_batch(config, shape) -> None:
    process = process_of(clip_sample_range=2.0)
    labels = torch.tensor([0.5, -0.5, 0.1, 0.9])

    def sample(rows: list[int]) -> torch.Tensor:
        generator = SampleGenerator.for_samples(3, torch.tensor(rows))
        x_T = generator.normal(shape)
        return config.sample(GaussianDenoiser(process), x_T, process, generator, Labels(labels[rows]))

    together = sample([0, 1, 2, 3])
    assert together.shape == (4, *shape)
    for i in range(4):
        torch.testing.assert_close(together[i : i + 1], sample([i]), rtol=0, atol=1e-6)
    torch.testing.assert_close(sample([2, 0]), together[[2, 0]], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "depends"),
    [
        (SamplingConfig(num_inference_steps=6), True),
        (SamplingConfig(sampler="ddim", num_inference_steps=6, eta=0.5), True),
        (SamplingConfig(sampler="ddim", num_inference_steps=6), False),
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


def test_a_guided_sample_is_moved_away_from_the_unconditional_data() -> None:
    """With means m and 0, guidance by s is the exact denoiser of mean s m; s = 0 is that of mean 0."""
    process = process_of(prediction_type="sample")
    x_T = streams(3).normal((5,))

    def sample(scale: float, labels: list[float]) -> torch.Tensor:
        config = SamplingConfig(sampler="ddim", num_inference_steps=20, guidance_scale=scale)
        return config.sample(GaussianDenoiser(process), x_T, process, streams(3), Labels(torch.tensor(labels)))

    torch.testing.assert_close(sample(3.0, [0.1, 0.2, -0.3]), sample(1.0, [0.3, 0.6, -0.9]))
    torch.testing.assert_close(sample(0.0, [0.1, 0.2, -0.3]), sample(1.0, [0.0, 0.0, 0.0]))


def test_a_guided_run_keeps_the_learned_variance() -> None:
    """The process decides whether the network's second half is a variance: it must not be extrapolated."""
    process = process_of(variance_type="learned_range")
    seen = []

    def denoise(x_t: torch.Tensor, timesteps: torch.Tensor, cond: Labels) -> torch.Tensor:
        seen.append(x_t.shape[0])
        values = torch.where(cond.values == 0, -1e6, 0.0)[:, None].expand_as(x_t)
        return torch.cat([torch.zeros_like(x_t), values], dim=1)

    config = SamplingConfig(num_inference_steps=3, guidance_scale=2.0)
    samples = config.sample(denoise, torch.zeros(2, 4), process, streams(2), Labels(torch.ones(2)))
    assert samples.isfinite().all()
    assert seen == [4, 4, 4]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
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


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
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
        ({"sampler": "ddim", "eta": 1.5}, "eta = 1.5"),
        ({"sampler": "ddpm", "eta": 0.5}, "eta = 0.5 is a setting of sampler ddim"),
    ],
)
def test_bad_settings_are_refused(settings, message) -> None:
    with pytest.raises(ValidationError):
        SamplingConfig(**settings)
    with pytest.raises(ConfigError, match=message):
        SamplingConfig.from_dict(settings)


def test_more_steps_than_the_process_has_are_refused() -> None:
    config = SamplingConfig(num_inference_steps=11)
    process = process_of(num_train_timesteps=10)
    with pytest.raises(ValueError, match="num_inference_steps must be between 1 and num_train_timesteps = 10, not 11"):
        config.sample(GaussianDenoiser(process), torch.zeros(1, 2), process, streams(1), None)
    assert config.merged({"num_inference_steps": 3}).timesteps(10) == [9, 4, 0]


def test_ddim_with_eta_needs_noise() -> None:
    x, t = torch.zeros(1, 2), torch.tensor([5])
    with pytest.raises(ValueError, match=r"eta = 0\.5 needs noise"):
        ddim_step(process_of(), x, x, t, t - 1, None, eta=0.5)
