"""Losses against an independent float64 computation and the numbers of openai/guided-diffusion."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from unclip.config.base import ConfigError
from unclip.diffusion.losses import DiffusionLoss, DiffusionLossConfig, diffusion_loss
from unclip.diffusion.process import DiffusionConfig, DiffusionProcess
from unclip.diffusion.schedules import beta_schedule

SHAPE = (2, 3, 2, 2)
# training_losses of guided-diffusion (commit 22e0df8; learned range, rescaled MSE) on `fixed_tensors`: mse, then vb.
GUIDED_DIFFUSION_MSE = [0.7565310597419739, 1.3150634765625]
GUIDED_DIFFUSION_VB = {
    ("squaredcos_cap_v2", 1000, 0): [1.5615683794021606, 1.9598976373672485],
    ("squaredcos_cap_v2", 1000, 1): [0.533008337020874, 0.9170697927474976],
    ("squaredcos_cap_v2", 1000, 499): [0.0034100820776075125, 0.005928318481892347],
    ("squaredcos_cap_v2", 1000, 999): [545.1768798828125, 947.6708374023438],
    ("linear", 4000, 0): [4.872592926025391, 6.343057155609131],
    ("linear", 4000, 1): [2.016533136367798, 3.4678471088409424],
    ("linear", 4000, 1999): [0.005968841258436441, 0.01037580892443657],
    ("linear", 4000, 3999): [0.010969767346978188, 0.019068419933319092],
}


def loss_of(process: DiffusionProcess, *tensors: torch.Tensor, **settings) -> DiffusionLoss:
    """Of (model_output, x_start, x_t, noise, timesteps)."""
    output, x_start, x_t, noise, timesteps = tensors
    config = DiffusionLossConfig(**settings)
    return diffusion_loss(process, output, x_start=x_start, x_t=x_t, noise=noise, timesteps=timesteps, config=config)


def fixed_tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x_start, noise, prediction, variance values)."""
    index = torch.arange(24, dtype=torch.float64).reshape(SHAPE)
    x_start = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(SHAPE)
    return x_start.float(), (3 * index + 1).sin().float(), (2 * index).cos().float(), (5 * index + 2).sin().float()


def learned(schedule: str = "squaredcos_cap_v2", num_train_timesteps: int = 1000, **settings) -> DiffusionProcess:
    return DiffusionConfig(
        beta_schedule=schedule, num_train_timesteps=num_train_timesteps, variance_type="learned_range", **settings
    ).build()


@pytest.mark.parametrize("case", GUIDED_DIFFUSION_VB, ids=str)
def test_hybrid_loss_is_guided_diffusions(case) -> None:
    schedule, num_train_timesteps, timestep = case
    # Clipping is for sampling: guided-diffusion's bound, too, is that of the raw prediction.
    process = learned(schedule, num_train_timesteps, clip_sample_range=1.0)
    x_start, noise, prediction, values = fixed_tensors()
    timesteps = torch.full((2,), timestep)
    x_t = process.q_sample(x_start, timesteps, noise)
    loss = loss_of(process, torch.cat([prediction, values], dim=1), x_start, x_t, noise, timesteps)
    vb = torch.tensor(GUIDED_DIFFUSION_VB[case])
    mse = torch.tensor(GUIDED_DIFFUSION_MSE)
    torch.testing.assert_close(loss.mse, mse, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.vlb * num_train_timesteps / 1000, vb, rtol=3e-4, atol=0)
    torch.testing.assert_close(loss.loss, mse + vb, rtol=3e-4, atol=0)


def exact_vlb(prediction_type: str, timestep: int) -> np.ndarray:
    """This term of the bound on `fixed_tensors` from textbook formulas: KL by moments, bins by scipy's normal."""
    x_start, noise, output, values = (x.double().numpy() for x in fixed_tensors())
    betas = beta_schedule("linear", 100).numpy()
    abar = np.cumprod(1 - betas)
    abar_t, abar_s = abar[timestep], abar[timestep - 1] if timestep else 1.0
    signal, sigma = abar_t**0.5, (1 - abar_t) ** 0.5
    x_t = signal * x_start + sigma * noise
    pred_x_start = {
        "epsilon": (x_t - sigma * output) / signal,
        "sample": output,
        "v_prediction": signal * x_t - sigma * output,
    }[prediction_type]
    first = max(timestep, 1)  # the variance of the last step is that of the step above
    beta_tilde = betas[first] * (1 - abar[first - 1]) / (1 - abar[first])
    deviation = np.sqrt(np.exp((values + 1) / 2 * np.log(betas[timestep]) + (1 - values) / 2 * np.log(beta_tilde)))
    start, stay = (
        abar_s**0.5 * betas[timestep] / (1 - abar_t),
        (1 - betas[timestep]) ** 0.5 * (1 - abar_s) / (1 - abar_t),
    )
    mean = start * pred_x_start + stay * x_t
    if timestep:
        true_mean = start * x_start + stay * x_t
        ratio = beta_tilde / deviation**2
        nats = 0.5 * (ratio - 1 - np.log(ratio) + (true_mean - mean) ** 2 / deviation**2)
    else:
        upper = np.where(x_start > 0.999, np.inf, x_start + 1 / 255)
        lower = np.where(x_start < -0.999, -np.inf, x_start - 1 / 255)
        mass = stats.norm.cdf(upper, mean, deviation) - stats.norm.cdf(lower, mean, deviation)
        nats = -np.log(np.maximum(mass, 1e-12))
    return nats.reshape(2, -1).mean(axis=1) / math.log(2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("timestep", [0, 1, 50, 99])
def test_vlb_is_the_textbooks(prediction_type, timestep) -> None:
    process = learned("linear", 100, prediction_type=prediction_type)
    x_start, noise, prediction, values = fixed_tensors()
    timesteps = torch.full((2,), timestep)
    x_t = process.q_sample(x_start, timesteps, noise)
    loss = loss_of(process, torch.cat([prediction, values], dim=1), x_start, x_t, noise, timesteps)
    # At t = 0 the tanh for the normal distribution is the difference.
    tolerance = 0.03 if timestep == 0 else 2e-4
    np.testing.assert_allclose(loss.vlb.numpy(), exact_vlb(prediction_type, timestep), rtol=tolerance)


def test_the_bound_trains_the_variance_only() -> None:
    process = learned()
    x_start, noise, prediction, values = fixed_tensors()
    timesteps = torch.tensor([0, 400])
    x_t = process.q_sample(x_start, timesteps, noise)
    output = torch.cat([prediction, values], dim=1).requires_grad_()
    loss = loss_of(process, output, x_start, x_t, noise, timesteps)
    (gradient,) = torch.autograd.grad(loss.vlb.sum(), output, retain_graph=True)
    assert (gradient[:, :3] == 0).all()
    assert (gradient[:, 3:] != 0).all()
    (gradient,) = torch.autograd.grad(loss.mse.sum(), output)
    torch.testing.assert_close(gradient[:, :3], 2 * (prediction - noise) / 12)
    assert (gradient[:, 3:] == 0).all()


def test_the_bound_is_least_at_the_true_variance() -> None:
    """With the true mean, KL is 0 at the posterior's variance (-1) and grows with distance from it."""
    process = learned()
    x_start, noise, _, _ = fixed_tensors()
    timesteps = torch.tensor([3, 300])
    x_t = process.q_sample(x_start, timesteps, noise)
    vlb = [
        loss_of(process, torch.cat([noise, torch.full_like(noise, v)], 1), x_start, x_t, noise, timesteps).vlb
        for v in (-1.0, -0.5, 0.5, 1.0)
    ]
    torch.testing.assert_close(vlb[0], torch.zeros(2), rtol=0, atol=1e-6)
    assert all((later > earlier).all() for earlier, later in itertools.pairwise(vlb))


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_fixed_variances_train_on_the_mean_squared_error(prediction_type, variance_type) -> None:
    process = DiffusionConfig(prediction_type=prediction_type, variance_type=variance_type).build()
    x_start, noise, prediction, _ = fixed_tensors()
    timesteps = torch.tensor([20, 700])
    loss = loss_of(process, prediction, x_start, process.q_sample(x_start, timesteps, noise), noise, timesteps)
    target = process.target(x_start, noise, timesteps).double().numpy()
    expected = ((prediction.double().numpy() - target) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(loss.mse.numpy(), expected, rtol=1e-5)
    assert loss.loss is loss.mse
    assert loss.vlb is None


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_float32_for_every_sample_by_itself(variance_type, dtype) -> None:
    process = DiffusionConfig(variance_type=variance_type).build()
    x_start, noise, prediction, values = (x.to(dtype) for x in fixed_tensors())
    output = torch.cat([prediction, values], dim=1) if variance_type == "learned_range" else prediction
    timesteps = torch.tensor([0, 700])
    tensors = output, x_start, process.q_sample(x_start, timesteps, noise), noise, timesteps
    before = [x.clone() for x in tensors]
    loss = loss_of(process, *tensors)
    assert loss.loss.dtype == torch.float32
    assert loss.loss.shape == (2,)
    for i in range(2):
        alone = loss_of(process, *(x[i : i + 1] for x in tensors))
        torch.testing.assert_close(alone.loss, loss.loss[i : i + 1], rtol=1e-6, atol=0)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


def test_vectors_have_losses_too() -> None:
    process = DiffusionConfig(prediction_type="sample").build()
    x_start = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    loss = loss_of(process, torch.zeros(2, 2), x_start, x_start, x_start, torch.tensor([3, 4]))
    assert loss.loss.tolist() == [2.5, 0.0]


@pytest.mark.parametrize("kind", ["hybrid", "vlb"])
def test_extreme_outputs_have_finite_losses_and_gradients(kind) -> None:
    process = learned()
    x_start, noise, _, _ = fixed_tensors()
    for scale in (0.0, 10.0, -10.0, 1e4, -1e4, 1e9, -1e9):
        for timestep in (0, 1, 999):
            timesteps = torch.full((2,), timestep)
            output = (scale * torch.ones(2, 6, 2, 2)).requires_grad_()
            x_t = process.q_sample(x_start, timesteps, noise)
            loss = loss_of(process, output, x_start, x_t, noise, timesteps, kind=kind).loss
            (gradient,) = torch.autograd.grad(loss.sum(), output)
            assert loss.isfinite().all()
            assert gradient.isfinite().all()


def test_a_prediction_of_another_shape_is_refused() -> None:
    process = DiffusionConfig().build()
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"prediction has shape \(2, 6, 4, 4\), but x_start \(2, 3, 4, 4\)"):
        loss_of(process, torch.zeros(2, 6, 4, 4), x, x, x, torch.tensor([1, 2]))


# --- the bound alone --------------------------------------------------------------------------------------------------


def test_the_pure_bound_is_the_whole_sum_and_trains_the_mean() -> None:
    """Its expectation over uniform timesteps is the sum of all T terms; the gradient goes through mean and variance."""
    process = learned("linear", 100)
    x_start, noise, prediction, values = fixed_tensors()
    timesteps = torch.tensor([1, 50])
    x_t = process.q_sample(x_start, timesteps, noise)
    output = torch.cat([prediction, values], dim=1).requires_grad_()
    loss = loss_of(process, output, x_start, x_t, noise, timesteps, kind="vlb")
    for row, timestep in enumerate((1, 50)):
        np.testing.assert_allclose(loss.vlb[row].item(), exact_vlb("epsilon", timestep)[row], rtol=2e-4)
    torch.testing.assert_close(loss.loss, 100 * loss.vlb)
    (gradient,) = torch.autograd.grad(loss.vlb.sum(), output)
    # KL = (mean difference)^2 / (2 variance) + ..., and the means differ as the noises do, times beta / (sqrt(alpha) sigma).
    betas = beta_schedule("linear", 100)[timesteps]
    abar = process.alphas_cumprod(timesteps)
    factor = (betas**2 / ((1 - betas) * (1 - abar))).float().reshape(2, 1, 1, 1)
    log_variance = process.model_log_variance(values, x_t, timesteps, timesteps - 1)
    expected = factor * (prediction - noise) / log_variance.exp() / 12 / math.log(2)
    torch.testing.assert_close(gradient[:, :3], expected, rtol=1e-3, atol=1e-7)
    assert (gradient[:, 3:] != 0).all()


def test_losses_that_do_not_suit_the_process_are_refused() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="kind vlb needs variance_type learned_range, not fixed_small"):
        loss_of(DiffusionConfig().build(), x, x, x, x, torch.tensor([1, 2]), kind="vlb")
    pure_noise = DiffusionConfig(prediction_type="v_prediction", zero_terminal_snr=True)
    with pytest.raises(ValueError, match=r"min_snr_gamma = 5\.0 gives the last timestep no weight"):
        DiffusionLossConfig(min_snr_gamma=5).check(pure_noise)
    DiffusionLossConfig().check(pure_noise)
    with pytest.raises(ConfigError, match=r"min_snr_gamma = 5\.0 weighs the squared error, of which kind vlb has none"):
        DiffusionLossConfig.from_dict({"kind": "vlb", "min_snr_gamma": 5.0})


# --- min-SNR ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_min_snr_weighs_the_error_of_x_start_whatever_is_predicted(prediction_type, gamma) -> None:
    process = DiffusionConfig(prediction_type=prediction_type).build()
    x_start, noise, prediction, _ = (x.double() for x in fixed_tensors())
    timesteps = torch.tensor([100, 700])  # signal-to-noise ratios above 5 and below 1
    abar = process.alphas_cumprod(timesteps).reshape(2, 1, 1, 1)
    x_t = process.q_sample(x_start, timesteps, noise)
    if prediction_type == "sample":
        pred_x_start = prediction
    elif prediction_type == "epsilon":
        pred_x_start = (x_t - (1 - abar).sqrt() * prediction) / abar.sqrt()
    else:
        pred_x_start = abar.sqrt() * x_t - (1 - abar).sqrt() * prediction
    weight = torch.minimum(abar / (1 - abar), torch.tensor(gamma))
    expected = (weight * (pred_x_start - x_start) ** 2).mean(dim=(1, 2, 3))
    loss = loss_of(process, prediction, x_start, x_t, noise, timesteps, min_snr_gamma=gamma)
    torch.testing.assert_close(loss.loss, expected.float(), rtol=1e-4, atol=0)
    unweighted = loss_of(process, prediction, x_start, x_t, noise, timesteps)
    assert torch.equal(loss.mse, unweighted.loss)


def test_min_snr_leaves_the_bound_of_the_hybrid_loss_alone() -> None:
    process = learned()
    x_start, noise, prediction, values = fixed_tensors()
    timesteps = torch.tensor([100, 700])
    tensors = torch.cat([prediction, values], dim=1), x_start, process.q_sample(x_start, timesteps, noise), noise
    plain, weighted = (loss_of(process, *tensors, timesteps, min_snr_gamma=gamma) for gamma in (None, 5.0))
    assert torch.equal(plain.vlb, weighted.vlb)
    abar = process.alphas_cumprod(timesteps)
    weight = (5 * (1 - abar) / abar).clamp(max=1).float()  # of noise: min(SNR, 5) / SNR
    torch.testing.assert_close(weighted.loss - weighted.vlb, weight * plain.mse, rtol=1e-5, atol=1e-6)
    assert weight[0] < 1 == weight[1]
