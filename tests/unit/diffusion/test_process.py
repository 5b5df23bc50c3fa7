"""The diffusion process against Bayes' rule, known constants and its own identities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from unclip.config.base import ConfigError
from unclip.diffusion.process import DiffusionConfig, DiffusionProcess
from unclip.diffusion.respacing import sampling_timesteps
from unclip.diffusion.schedules import beta_schedule

SHAPES = [(6, 5), (6, 3, 4, 4)]
SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]


def build(**settings) -> DiffusionProcess:
    return DiffusionConfig(**settings).build()


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_alphas_cumprod_from_clean_to_pure_noise() -> None:
    process = build(num_train_timesteps=50)
    values = process.alphas_cumprod(torch.tensor([-1, 0, 20, 49, 50]))
    expected = (1 - beta_schedule("squaredcos_cap_v2", 50)).cumprod(dim=0)
    assert values.dtype == torch.float64
    assert values.tolist() == [1.0, expected[0], expected[20], expected[49], 0.0]


def test_q_sample_composes_the_single_steps() -> None:
    """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise, repeated, has the mean and variance of q_sample."""
    process = build(beta_schedule="linear", num_train_timesteps=100)
    mean, variance = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for t, beta in enumerate(beta_schedule("linear", 100)):
        mean, variance = mean * (1 - beta).sqrt(), variance * (1 - beta) + beta
        timesteps = torch.tensor([t])
        torch.testing.assert_close(process.q_sample(one, timesteps, zero).squeeze(), mean)
        torch.testing.assert_close(process.q_sample(zero, timesteps, one).squeeze() ** 2, variance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_target_predicts_x_start_and_noise(shape, prediction_type) -> None:
    process = build(prediction_type=prediction_type)
    x_start, noise, timesteps = randn(*shape), randn(*shape, seed=1), torch.tensor([0, 1, 100, 500, 900, 998])
    x_t = process.q_sample(x_start, timesteps, noise)
    pred_x_start = process.pred_x_start(process.target(x_start, noise, timesteps), x_t, timesteps)
    torch.testing.assert_close(pred_x_start, x_start, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(process.pred_noise(pred_x_start, x_t, timesteps), noise, rtol=1e-9, atol=1e-9)


def test_targets() -> None:
    x_start, noise, timesteps = randn(2, 3), randn(2, 3, seed=1), torch.tensor([10, 990])
    assert torch.equal(build().target(x_start, noise, timesteps), noise)
    assert torch.equal(build(prediction_type="sample").target(x_start, noise, timesteps), x_start)
    process = build(prediction_type="v_prediction")
    angle = process.alphas_cumprod(timesteps).sqrt().acos()[:, None]  # v is the velocity along this angle
    expected = angle.cos() * noise - angle.sin() * x_start
    torch.testing.assert_close(process.target(x_start, noise, timesteps), expected)


@pytest.mark.parametrize("pair", [(1, 0), (500, 499), (999, 998), (999, 832), (800, 3), (42, 0)])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_posterior_is_bayes_rule(schedule, pair) -> None:
    """Precisions add: x_s has the prior N(sqrt(abar_s) x_start, 1 - abar_s), and x_t given x_s is N(a x_s, beta)."""
    process = build(beta_schedule=schedule)
    x_start, x_t = randn(4, 3), randn(4, 3, seed=1)
    timesteps, prev_timesteps = torch.full((4,), pair[0]), torch.full((4,), pair[1])
    mean, log_variance = process.posterior(x_start, x_t, timesteps, prev_timesteps)
    betas = beta_schedule(schedule, 1000)
    abar_s, alpha = (1 - betas[: pair[1] + 1]).prod(), (1 - betas[pair[1] + 1 : pair[0] + 1]).prod()
    precision = 1 / (1 - abar_s) + alpha / (1 - alpha)
    expected = (abar_s.sqrt() * x_start / (1 - abar_s) + alpha.sqrt() * x_t / (1 - alpha)) / precision
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_variance, (1 / precision).log().expand(4, 1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("timestep", [0, 7, 999])
def test_a_step_to_the_clean_sample_has_x_start_as_its_mean(timestep: int) -> None:
    x_start, x_t = randn(2, 3), randn(2, 3, seed=1)
    mean, _ = build().posterior(x_start, x_t, torch.full((2,), timestep), torch.full((2,), -1))
    assert torch.equal(mean, x_start)


def test_log_variance_of_a_step_to_the_clean_sample_is_that_of_the_step_above() -> None:
    process = build()
    x = randn(3, 2)
    _, last = process.posterior(x, x, torch.tensor([0, 41, 999]), torch.tensor([-1, -1, -1]))
    _, above = process.posterior(x, x, torch.tensor([1, 42, 999]), torch.tensor([0, 41, 0]))
    assert torch.equal(last[:2], above[:2])
    # Above the noisiest step there is pure noise, which says nothing of x_s: its variance is the prior's.
    torch.testing.assert_close(last[2, 0], (1 - process.alphas_cumprod(torch.tensor(999))).log())
    timesteps, clean = torch.tensor([0, 41, 999]), torch.tensor([-1, -1, -1])
    for variance_type in ("fixed_small", "fixed_large"):
        assert torch.equal(build(variance_type=variance_type).model_log_variance(None, x, timesteps, clean), last)


def test_known_variances() -> None:
    """Constants of diffusers' UnCLIPScheduler at t = 1, 487, 999, each from t - 1."""
    timesteps = torch.tensor([1, 487, 999])
    x = randn(3, 1)
    small = build().model_log_variance(None, x, timesteps, timesteps - 1)
    torch.testing.assert_close((small / 2).exp()[1:, 0].tolist(), [0.0549625, 0.9994987], rtol=0, atol=1e-6)
    learned = build(variance_type="learned_range")
    values = learned.model_log_variance(torch.full_like(x, 0.5), x, timesteps, timesteps - 1)
    torch.testing.assert_close(values[:, 0].tolist(), [-10.1712790, -5.7998052, -0.0010011], rtol=0, atol=2e-4)


@pytest.mark.parametrize("pair", [(1, 0), (487, 486), (999, 832), (500, 20)])
def test_learned_variance_spans_posterior_to_beta(pair) -> None:
    learned, small, large = (build(variance_type=kind) for kind in ("learned_range", "fixed_small", "fixed_large"))
    x = randn(2, 3)
    steps = torch.full((2,), pair[0]), torch.full((2,), pair[1])
    low, high = small.model_log_variance(None, x, *steps), large.model_log_variance(None, x, *steps)
    beta = 1 - learned.alphas_cumprod(steps[0]) / learned.alphas_cumprod(steps[1])
    torch.testing.assert_close(high[:, 0], beta.log())
    assert (low < high).all()
    for value, expected in ((-1, low), (1, high), (0, (low + high) / 2)):
        values = learned.model_log_variance(torch.full_like(x, value), x, *steps)
        torch.testing.assert_close(values, expected.expand_as(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_a_process_of_one_step_is_finite(variance_type) -> None:
    process = build(num_train_timesteps=1, variance_type=variance_type)
    x, first, clean = randn(2, 3), torch.zeros(2).long(), torch.full((2,), -1)
    values = torch.zeros_like(x) if variance_type == "learned_range" else None
    torch.testing.assert_close(process.posterior(x, x, first, clean)[0], x)
    assert process.model_log_variance(values, x, first, clean).isfinite().all()


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_results_have_the_type_of_the_sample_and_every_sample_its_own_timestep(variance_type, dtype) -> None:
    process = build(variance_type=variance_type, prediction_type="v_prediction", dynamic_threshold=0.9)
    shape = (4, 3, 2, 2)
    x, y = randn(*shape).to(dtype), randn(*shape, seed=1).to(dtype)
    values = y if variance_type == "learned_range" else None
    timesteps, prev_timesteps = torch.tensor([0, 3, 500, 999]), torch.tensor([-1, -1, 250, 998])

    def everything(rows: slice) -> list[torch.Tensor]:
        a, b, t, s = x[rows], y[rows], timesteps[rows], prev_timesteps[rows]
        return [
            process.q_sample(a, t, b),
            process.target(a, b, t),
            process.pred_x_start(a, b, t),
            process.pred_noise(a, b, t),
            *process.posterior(a, b, t, s),
            process.model_log_variance(None if values is None else values[rows], b, t, s),
        ]

    whole = everything(slice(None))
    for i in range(4):
        for together, alone in zip(whole, everything(slice(i, i + 1)), strict=True):
            assert together.dtype == alone.dtype == dtype
            torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=0)


def test_split() -> None:
    output = randn(2, 6, 4, 4)
    prediction, values = build(variance_type="learned_range").split(output)
    assert torch.equal(prediction, output[:, :3])
    assert torch.equal(values, output[:, 3:])
    prediction, values = build().split(output)
    assert prediction is output
    assert values is None


def test_static_threshold() -> None:
    x_start = torch.tensor([[-3.0, -1.5, 0.2, 9.0]])
    process = build(prediction_type="sample", clip_sample_range=1.5)
    timesteps = torch.tensor([5])
    assert process.pred_x_start(x_start, x_start, timesteps).tolist() == [[-1.5, -1.5, torch.tensor(0.2), 1.5]]
    assert torch.equal(process.raw_x_start(x_start, x_start, timesteps), x_start)


def test_dynamic_threshold() -> None:
    """Values 0.1 .. 10.1 have their 0.9 quantile at 9.1; the second sample, within [-1, 1], stays as it is."""
    signs = torch.tensor([1.0, -1.0]).repeat(51)[:101]
    saturated = (torch.arange(101) / 10 + 0.1) * signs
    x_start = torch.stack([saturated, saturated / 20])
    process = build(prediction_type="sample", dynamic_threshold=0.9)
    thresholded = process.pred_x_start(x_start, x_start, torch.tensor([5, 5]))
    torch.testing.assert_close(thresholded[0], saturated.clamp(-9.1, 9.1) / 9.1)
    assert torch.equal(thresholded[1], x_start[1])


def test_inputs_are_never_changed() -> None:
    process = build(variance_type="learned_range", clip_sample_range=0.5)
    x, y = randn(2, 3), randn(2, 3, seed=1)
    before = x.clone(), y.clone()
    t, s = torch.tensor([5, 900]), torch.tensor([-1, 450])
    process.pred_x_start(process.q_sample(x, t, y), y, t)
    process.posterior(x, y, t, s)
    process.model_log_variance(x, y, t, s)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


def test_wrong_shapes_are_refused() -> None:
    learned = build(variance_type="learned_range")
    with pytest.raises(ValueError, match=r"twice the channels .* \(2, 3, 4, 4\)"):
        learned.split(randn(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"prediction has shape \(2, 1, 4, 4\), but x_t \(2, 3, 4, 4\)"):
        learned.pred_x_start(randn(2, 1, 4, 4), randn(2, 3, 4, 4), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="learned_range needs variance_values"):
        learned.model_log_variance(None, randn(2, 3), torch.tensor([1, 2]), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"beta_schedule": "linear", "num_train_timesteps": 10}, "num_train_timesteps = 10"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule"),
        ({"prediction_type": "x0"}, "prediction_type"),
        ({"variance_type": "learned"}, "variance_type"),
        ({"clip_sample_range": 0.0}, "clip_sample_range"),
        ({"dynamic_threshold": 1.5}, "dynamic_threshold"),
        ({"clip_sample_range": 1.0, "dynamic_threshold": 0.9}, "exclude each other"),
        ({"zero_terminal_snr": True}, "prediction_type epsilon cannot be used with zero_terminal_snr"),
        ({"zero_terminal_snr": True, "prediction_type": "sample", "num_train_timesteps": 1}, "at least 2, not 1"),
        ({"variance_type": "analytic"}, "analytic needs analytic_noise_error"),
        ({"variance_type": "analytic", "analytic_noise_error": [0.5] * 9}, "= 1000 entries, not 9"),
        ({"analytic_noise_error": [-0.1] * 1000}, "analytic_noise_error"),
        ({"analytic_variance_bound": 0.0}, "analytic_variance_bound"),
    ],
)
def test_bad_settings_are_refused(settings, message) -> None:
    with pytest.raises(ValidationError):
        DiffusionConfig(**settings)
    with pytest.raises(ConfigError, match=message):
        DiffusionConfig.from_dict(settings)


def test_a_process_built_under_a_meta_device_works() -> None:
    with torch.device("meta"):
        process = build(beta_schedule="linear")
    assert process.alphas_cumprod(torch.tensor([-1])).item() == 1


# --- zero terminal SNR ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_last_timestep_is_pure_noise(schedule) -> None:
    process = build(beta_schedule=schedule, zero_terminal_snr=True, prediction_type="v_prediction")
    last = torch.full((2,), 999)
    assert process.alphas_cumprod(torch.tensor([999, 1000])).tolist() == [0, 0]
    x_start, noise = randn(2, 3), randn(2, 3, seed=1)
    x_t = process.q_sample(x_start, last, noise)
    assert torch.equal(x_t, noise)
    target = process.target(x_start, noise, last)
    assert torch.equal(target, -x_start)
    assert torch.equal(process.pred_x_start(target, x_t, last), x_start)
    assert torch.equal(process.pred_noise(x_start, x_t, last), noise)


@pytest.mark.parametrize("previous", [998, 500, 0, -1])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range", "analytic"])
@pytest.mark.parametrize("measured", [0.99, 1.0, 1.01])
def test_a_step_from_pure_noise_forgets_it(measured, variance_type, previous) -> None:
    """x_s is then drawn from q(x_s | x_start): x_t says nothing of it."""
    # Measured at pure noise, where every answer is the noise itself, it is 1 but for the draws: that says nothing.
    table = [0.9] * 999 + [measured] if variance_type == "analytic" else None
    process = build(
        zero_terminal_snr=True,
        prediction_type="sample",
        variance_type=variance_type,
        analytic_noise_error=table,
        analytic_variance_bound=0.3,
    )
    x_start, x_t = randn(2, 3), randn(2, 3, seed=1)
    steps = torch.full((2,), 999), torch.full((2,), previous)
    abar = process.alphas_cumprod(steps[1])[0]
    mean, log_variance = process.posterior(x_start, x_t, *steps)
    torch.testing.assert_close(mean, abar.sqrt() * x_start, rtol=1e-12, atol=1e-12)
    expected = torch.zeros(()).double() if previous < 0 else (1 - abar).log()
    torch.testing.assert_close(log_variance[0, 0], expected, rtol=1e-12, atol=1e-12)
    values = torch.zeros_like(x_t) if variance_type == "learned_range" else None
    variance = process.model_log_variance(values, x_t, *steps).exp()[0, 0]
    if previous >= 0:
        exact = {
            "fixed_small": 1 - abar,
            "fixed_large": 1 - 0 * abar,
            "learned_range": (1 - abar).sqrt(),  # half way between the two, in logarithms
            "analytic": 1 - abar + 0.3 * abar,  # nothing is known of x_start but its variance
        }[variance_type]
        torch.testing.assert_close(variance, exact, rtol=1e-12, atol=0)
    assert variance == 1 if previous < 0 else variance > 0


# --- analytic variance ------------------------------------------------------------------------------------------------


def gaussian(std: float, **settings) -> DiffusionProcess:
    """For data N(0, std^2): x_t has variance v = abar std^2 + 1 - abar, and E[noise | x_t] = sqrt(1 - abar) x_t / v."""
    total = settings.get("num_train_timesteps", 1000)
    abar = build(**settings).alphas_cumprod(torch.arange(total))
    noise_error = (1 - abar) / (abar * std**2 + 1 - abar)
    return build(
        variance_type="analytic",
        analytic_noise_error=tuple(noise_error.tolist()),
        analytic_variance_bound=std**2,
        **settings,
    )


@pytest.mark.parametrize("std", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("pair", [(1, 0), (500, 499), (999, 998), (999, 832), (800, 3), (42, 0), (500, -1), (0, -1)])
@pytest.mark.parametrize("settings", [{}, {"beta_schedule": "linear"}, {"beta_schedule": "scaled_linear"}], ids=str)
def test_the_analytic_variance_of_gaussian_data_is_the_true_one(settings, pair, std) -> None:
    process = gaussian(std, **settings)
    steps = torch.full((2,), pair[0]), torch.full((2,), pair[1])
    abar_t, abar_s = (process.alphas_cumprod(step)[0] for step in steps)
    var_t, var_s = (abar * std**2 + 1 - abar for abar in (abar_t, abar_s))
    exact = var_s - (abar_t / abar_s) * var_s**2 / var_t  # Cov(x_s, x_t) = sqrt(abar_t / abar_s) Var(x_s)
    log_variance = process.model_log_variance(None, randn(2, 3), *steps)
    torch.testing.assert_close(log_variance, exact.log().expand(2, 1), rtol=0, atol=1e-6)


def sampled_variance(process: DiffusionProcess, std: float, steps: int) -> float:
    """Of ancestral samples with the exact score of N(0, std^2): every step is linear in x_t and adds known noise."""
    variance = 1.0
    one = torch.ones(1, 1, dtype=torch.float64)
    timesteps = sampling_timesteps(1000, steps, "linspace")
    for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True):
        step = torch.tensor([t]), torch.tensor([s])
        abar = process.alphas_cumprod(step[0])
        gain = abar.sqrt() * std**2 / (abar * std**2 + 1 - abar)
        mean, _ = process.posterior(gain * one, one, *step)
        added = float(process.model_log_variance(None, one, *step).exp()) if s >= 0 else 0.0
        variance = float(mean) ** 2 * variance + added
    return variance


@pytest.mark.parametrize("std", [0.4, 1.5])
@pytest.mark.parametrize("steps", [5, 25])
def test_sampling_with_the_analytic_variance_recovers_the_datas(std, steps) -> None:
    assert sampled_variance(gaussian(std), std, steps) == pytest.approx(std**2, rel=1e-3)
    small, large = (
        sampled_variance(build(variance_type=kind), std, steps) / std**2 for kind in ("fixed_small", "fixed_large")
    )
    assert small < 0.98
    # Beta would be the true one for data of variance 1.
    assert large > 1.005 if std < 1 else large < 0.98


def test_the_analytic_variance_is_the_mean_square_error_of_the_posterior_mean() -> None:
    """Theorem 1 for data that is not Gaussian, half -a and half a, by quadrature over x_t."""
    a, t, s = 0.8, 400, 250
    abar, abar_s = (float(build().alphas_cumprod(torch.tensor([step]))) for step in (t, s))
    x = np.linspace(-8, 8, 20001)
    bumps = [np.exp(-((x - sign * a * abar**0.5) ** 2) / (2 * (1 - abar))) for sign in (-1, 1)]
    density = (bumps[0] + bumps[1]) / (bumps[0] + bumps[1]).sum()
    x_start = a * (bumps[1] - bumps[0]) / (bumps[1] + bumps[0])
    noise = (x - abar**0.5 * x_start) / (1 - abar) ** 0.5
    table = [1.0] * t + [float((density * noise**2).sum())] + [1.0] * (999 - t)
    process = build(variance_type="analytic", analytic_noise_error=table)
    unknown = float((density * (a**2 - x_start**2)).sum())  # E Var[x_start | x_t]
    start_weight = abar_s**0.5 * (1 - abar / abar_s) / (1 - abar)
    expected = (1 - abar_s) / (1 - abar) * (1 - abar / abar_s) + start_weight**2 * unknown
    found = process.model_log_variance(None, randn(1, 1), torch.tensor([t]), torch.tensor([s])).exp()
    assert float(found) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("bound", [0.3, 1.0])
def test_measured_tables_are_kept_within_the_bounds(bound) -> None:
    """A table is measured: near pure noise its error is divided by abar. No variance is below the posterior's, nor does
    it say more of x_start than that its mean square is the bound."""
    x, steps = randn(1, 1), (torch.tensor([990]), torch.tensor([700]))
    abar_t, abar_s = build().alphas_cumprod(torch.cat(steps))
    start_weight = abar_s.sqrt() * (1 - abar_t / abar_s) / (1 - abar_t)
    low = build().model_log_variance(None, x, *steps).exp()
    high = low + start_weight**2 * bound
    for error, expected in ((0.0, high), (0.9, high), (1.0, low), (1.1, low)):
        process = build(variance_type="analytic", analytic_noise_error=[error] * 1000, analytic_variance_bound=bound)
        torch.testing.assert_close(process.model_log_variance(None, x, *steps).exp(), expected, rtol=1e-12, atol=0)
