"""Guidance on denoisers whose outputs are known."""

from __future__ import annotations

import pytest
import torch
from tests.support.gaussian import CorrelatedDenoiser, Labels, moments, process_of, rowwise, streams

from unclip.diffusion.guidance import GuidedCondition, classifier_free, gradient_guided
from unclip.diffusion.process import DiffusionProcess
from unclip.diffusion.respacing import sampling_timesteps, step_pairs
from unclip.diffusion.samplers import DDIM, DDPM, DPMSolverPP, SamplingConfig


class Denoiser:
    """Output depends on picture, timestep and label, in each of `channels` in its own way; notes its batch sizes."""

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.sizes: list[int] = []

    def __call__(self, x_t: torch.Tensor, timesteps: torch.Tensor, cond: Labels) -> torch.Tensor:
        assert x_t.shape[0] == timesteps.shape[0] == cond.values.shape[0]
        self.sizes.append(len(x_t))
        shape = (-1, 1, 1, 1)
        frequency = torch.arange(1, self.channels + 1, dtype=x_t.dtype).reshape(1, -1, 1, 1)
        phase = x_t.sum(dim=1, keepdim=True) + timesteps.reshape(shape) / 7 + 2 * cond.values.reshape(shape)
        return torch.sin(frequency * phase)


def both_halves(cond: Labels) -> GuidedCondition[Labels]:
    return GuidedCondition.of(cond, lambda doubled: doubled)


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, Labels]:
    x_t = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x_t, torch.tensor([5, 40, 900]), Labels(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))


def test_a_scale_extrapolates_in_one_pass(inputs) -> None:
    x_t, timesteps, cond = inputs
    denoise = Denoiser(3)
    guided = classifier_free(denoise, 3.0, learned_variance=False)(x_t, timesteps, both_halves(cond))
    assert denoise.sizes == [6]
    conditional, uncond = denoise(x_t, timesteps, cond), denoise(x_t, timesteps, cond.unconditional())
    torch.testing.assert_close(guided, 3 * conditional - 2 * uncond)


@pytest.mark.parametrize("scale", [0.0, 1.0, torch.tensor([0.0, 1.0, 4.0])], ids=["0", "1", "beside others"])
@pytest.mark.parametrize("learned_variance", [True, False])
def test_scale_1_is_conditional_and_scale_0_unconditional_to_the_bit(inputs, scale, learned_variance) -> None:
    x_t, timesteps, cond = inputs
    denoise, prediction = Denoiser(6), slice(0, 3 if learned_variance else 6)
    guided = classifier_free(denoise, scale, learned_variance=learned_variance)(x_t, timesteps, both_halves(cond))
    halves = {0.0: cond.unconditional(), 1.0: cond}
    for row, value in enumerate(torch.as_tensor(scale).expand(3).tolist()):
        if value in halves:
            expected = denoise(x_t, timesteps, halves[value])
            assert torch.equal(guided[row, prediction], expected[row, prediction])


def test_the_unconditional_output_ignores_the_condition_and_not_the_sample(inputs) -> None:
    """DALLE2-pytorch's prior loses x_t in that branch: then guidance cannot be one."""
    x_t, timesteps, cond = inputs
    guided = classifier_free(Denoiser(3), 0.0, learned_variance=False)
    output = guided(x_t, timesteps, both_halves(cond))
    assert torch.equal(output, guided(x_t, timesteps, both_halves(Labels(cond.values + 1))))
    for other in (x_t + 0.3, x_t.roll(1, dims=0)):
        assert (output - guided(other, timesteps, both_halves(cond))).abs().amax(dim=(1, 2, 3)).min() > 0.1


def test_learned_variance_is_that_of_the_conditional_pass(inputs) -> None:
    x_t, timesteps, cond = inputs
    denoise = Denoiser(6)
    guided = classifier_free(denoise, 4.0, learned_variance=True)(x_t, timesteps, both_halves(cond))
    conditional, uncond = denoise(x_t, timesteps, cond), denoise(x_t, timesteps, cond.unconditional())
    torch.testing.assert_close(guided[:, :3], uncond[:, :3] + 4 * (conditional - uncond)[:, :3])
    assert torch.equal(guided[:, 3:], conditional[:, 3:])


@pytest.mark.parametrize("interval", [None, (30, 500), (torch.tensor([0, 0, 901]), torch.tensor([5, 41, 1000]))])
def test_a_scale_and_an_interval_for_each_sample(inputs, interval) -> None:
    x_t, timesteps, cond = inputs
    scales = torch.tensor([1.5, 2.5, 8.0])
    guide = classifier_free(Denoiser(3), scales, learned_variance=False, interval=interval)
    together = guide(x_t, timesteps, both_halves(cond))
    for i, scale in enumerate(scales.tolist()):
        row = torch.tensor([i])
        own = interval if interval is None else tuple(int(torch.as_tensor(bound).expand(3)[i]) for bound in interval)
        single = classifier_free(Denoiser(3), scale, learned_variance=False, interval=own)
        expected = single(x_t[row], timesteps[row], both_halves(cond.select(row)))
        torch.testing.assert_close(together[row], expected)


def test_outside_the_interval_only_the_conditional_half_runs(inputs) -> None:
    x_t, timesteps, cond = inputs
    denoise = Denoiser(3)
    whole = classifier_free(denoise, 3.0, learned_variance=False)(x_t, timesteps, both_halves(cond))
    conditional = denoise(x_t, timesteps, cond)
    denoise.sizes.clear()
    within = classifier_free(denoise, 3.0, learned_variance=False, interval=(40, 41))(x_t, timesteps, both_halves(cond))
    for row, expected in enumerate([conditional, whole, conditional]):  # 40 is in, its neighbours are not
        torch.testing.assert_close(within[row], expected[row])
    for interval in ((6, 40), (901, 1000)):
        outside = classifier_free(denoise, 3.0, learned_variance=False, interval=interval)
        assert torch.equal(outside(x_t, timesteps, both_halves(cond)), conditional)
    assert denoise.sizes == [6, 3, 3]


def test_rows_of_a_guided_condition_keep_their_halves_together() -> None:
    first, second = both_halves(Labels(torch.tensor([1.0, 2.0]))), both_halves(Labels(torch.tensor([3.0])))
    joined = first.cat(second)
    assert joined.batch_size == 3
    assert joined.doubled.values.tolist() == [0, 0, 0, 1, 2, 3]
    assert joined.conditional.values.tolist() == [1, 2, 3]
    assert joined.select(torch.tensor([2, 0])).doubled.values.tolist() == [0, 0, 3, 1]


@pytest.mark.parametrize("scale", [-1.0, torch.tensor([1.0, -0.5, 2.0])])
def test_negative_scales_are_refused(scale) -> None:
    with pytest.raises(ValueError, match="guidance_scale must not be negative"):
        classifier_free(Denoiser(3), scale, learned_variance=False)
    with pytest.raises(ValueError, match="gradient_scale must not be negative"):
        gradient_guided(Denoiser(3), lambda *_: torch.zeros(3), scale, process_of())


def test_scales_for_another_batch_are_refused(inputs) -> None:
    x_t, timesteps, cond = inputs
    guided = classifier_free(Denoiser(3), torch.ones(2), learned_variance=False)
    with pytest.raises(ValueError, match=r"one for each of 3 samples, not a tensor of shape \(2,\)"):
        guided(x_t, timesteps, both_halves(cond))


DATA_MEAN = torch.tensor([0.7, -0.3], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.25, 0.12], [0.12, 0.09]], dtype=torch.float64)
OBSERVED, ERROR = torch.tensor([0.2, 0.4], dtype=torch.float64), 0.3
"""y = x_start + N(0, ERROR^2) was seen to be OBSERVED."""


class Observation:
    """log p(y | x_t), exact: y given x_t is normal about E[x_start | x_t] with the variance of x_start and its own."""

    def __init__(self, process: DiffusionProcess) -> None:
        self.process, self.denoise = process, CorrelatedDenoiser(process, DATA_MEAN, COVARIANCE)

    def __call__(self, x_t: torch.Tensor, timesteps: torch.Tensor, cond: None) -> torch.Tensor:
        abar = rowwise(self.process.alphas_cumprod(timesteps), x_t)
        known = self.denoise.variances
        variances = known * (1 - abar) / (abar * known + 1 - abar) + ERROR**2
        distance = (OBSERVED - self.denoise.x_start(x_t, timesteps)) @ self.denoise.axes
        return -0.5 * (distance**2 / variances).sum(dim=1)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("sampler", [DDPM(), DDIM(), DDIM(0.5), DPMSolverPP(), DPMSolverPP(stochastic=True)], ids=repr)
def test_gradient_guidance_samples_the_posterior(prediction_type, sampler) -> None:
    """By Bayes' rule for Gaussians: precision S^-1 + ERROR^-2, whatever the sampler and the prediction type."""
    process = process_of(prediction_type=prediction_type)
    guided = gradient_guided(CorrelatedDenoiser(process, DATA_MEAN, COVARIANCE), Observation(process), 1.0, process)
    precision = COVARIANCE.inverse() + torch.eye(2, dtype=torch.float64) / ERROR**2
    posterior = precision.inverse()
    posterior_mean = posterior @ (COVARIANCE.inverse() @ DATA_MEAN + OBSERVED / ERROR**2)
    errors = []
    for steps in (40, 160):
        pairs = step_pairs(sampling_timesteps(1000, steps, "linspace"), 1000)
        mean, covariance = moments(sampler, process, guided, pairs, dim=2)
        errors.append(float(torch.cat([mean - posterior_mean, (covariance - posterior).flatten()]).abs().max()))
    assert errors[1] < 0.01
    assert errors[1] < errors[0] / 2, errors


def test_a_gradient_scale_for_each_sample(inputs) -> None:
    x_t, timesteps, cond = inputs
    process = process_of(variance_type="learned_range")
    denoise, scales = Denoiser(6), [0.0, 1.0, 3.0]

    def log_probability(x_t: torch.Tensor, timesteps: torch.Tensor, cond: Labels) -> torch.Tensor:
        return -(cond.values * (x_t**3).sum(dim=(1, 2, 3)))

    plain = denoise(x_t, timesteps, cond)
    guided = gradient_guided(denoise, log_probability, torch.tensor(scales), process)(x_t, timesteps, cond)
    sigma = (1 - process.alphas_cumprod(timesteps)).sqrt()
    for i, scale in enumerate(scales):
        expected = plain[i, :3] + sigma[i] * scale * cond.values[i] * 3 * x_t[i] ** 2
        torch.testing.assert_close(guided[i, :3], expected)
    assert torch.equal(guided[:, 3:], plain[:, 3:])


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_pure_noise_is_not_shifted(prediction_type) -> None:
    """abar is 0 at t = T: a shift of x_start by sigma^2 / sqrt(abar) would be infinite."""
    process = process_of(prediction_type=prediction_type)
    guided = gradient_guided(lambda x_t, t, cond: x_t, lambda x_t, t, cond: x_t.sum(dim=1), 2.0, process)
    x_t = torch.ones(2, 3)
    shifted = guided(x_t, torch.tensor([1000, 500]), None)
    assert torch.equal(shifted[0], x_t[0])
    assert shifted[1].isfinite().all()
    assert not torch.equal(shifted[1], x_t[1])


def test_a_guide_wraps_the_classifier_free_guidance_in_a_run() -> None:
    """It sees each sample once, and its gradient is not multiplied by the guidance scale."""
    process = process_of(prediction_type="v_prediction")
    sizes = []

    def denoise(x_t: torch.Tensor, timesteps: torch.Tensor, cond: Labels) -> torch.Tensor:
        return CorrelatedDenoiser(process, rowwise(cond.values, x_t) * DATA_MEAN, COVARIANCE)(x_t, timesteps, None)

    def log_probability(x_t: torch.Tensor, timesteps: torch.Tensor, cond: GuidedCondition[Labels]) -> torch.Tensor:
        sizes.append(len(x_t))
        assert cond.batch_size == len(x_t)
        return Observation(process)(x_t, timesteps, None)

    def sample(config: SamplingConfig, labels: list[float]) -> torch.Tensor:
        return config.sample(
            denoise,
            streams(2).normal((2,)).double(),
            process,
            streams(2),
            Labels(torch.tensor(labels, dtype=torch.float64)),
            guide=lambda network: gradient_guided(network, log_probability, 1.0, process),
        )

    config = SamplingConfig(sampler="ddim", num_inference_steps=10)
    # Guidance by 3 is the exact network for three times the mean.
    guided = sample(config.merged({"guidance_scale": 3.0}), [0.2, 0.5])
    assert sizes == [2] * 10
    unguided = config.sample(
        gradient_guided(denoise, lambda x, t, cond: Observation(process)(x, t, None), 1.0, process),
        streams(2).normal((2,)).double(),
        process,
        streams(2),
        Labels(torch.tensor([0.6, 1.5], dtype=torch.float64)),
    )
    torch.testing.assert_close(guided, unguided)


def test_gradients_need_more_than_inference_mode() -> None:
    guided = gradient_guided(lambda x_t, t, cond: x_t, lambda x_t, t, cond: x_t.sum(dim=1), 1.0, process_of())
    with torch.inference_mode(), pytest.raises(ValueError, match=r"sample under torch\.no_grad"):
        guided(torch.ones(1, 2), torch.tensor([5]), None)
