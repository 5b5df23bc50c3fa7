"""Bits per dimension against NumPy on a fixed network, and against closed forms for Gaussian data with the exact score."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from unclip.diffusion.likelihood import Likelihood, bits_per_dimension
from unclip.diffusion.process import DiffusionConfig, DiffusionProcess
from unclip.diffusion.schedules import beta_schedule
from unclip.utils.random import SampleGenerator

VARIANCES = ["fixed_small", "fixed_large", "learned_range", "analytic"]
LN2 = math.log(2)


def streams(count: int) -> SampleGenerator:
    return SampleGenerator.for_samples(0, torch.arange(count))


# --- any network ------------------------------------------------------------------------------------------------------

T, SHAPE = 30, (3, 2, 2, 2)
NOISE_ERROR = [0.5 + 0.01 * t for t in range(T)]


def network(x_t: np.ndarray, timesteps: np.ndarray, *, learned: bool) -> np.ndarray:
    prediction = np.cos(2 * x_t + timesteps[:, None, None, None])
    return np.concatenate([prediction, np.sin(5 * x_t)], axis=1) if learned else prediction


def reference(x_start: np.ndarray, variance_type: str, clip: float | None) -> dict[str, np.ndarray]:
    """The bound from textbook formulas: KL by moments, bins by scipy's normal."""
    generator, betas = streams(len(x_start)), beta_schedule("linear", T).numpy()
    abar = np.cumprod(1 - betas)
    vlb, mse = np.empty((len(x_start), T)), np.empty((len(x_start), T))
    for t in range(T):
        noise = generator.normal(SHAPE[1:]).double().numpy()
        abar_t, abar_s = abar[t], abar[t - 1] if t else 1.0
        x_t = abar_t**0.5 * x_start + (1 - abar_t) ** 0.5 * noise
        output = network(x_t, np.full(len(x_start), t), learned=variance_type == "learned_range")
        prediction = output[:, : SHAPE[1]]
        pred_x_start = (x_t - (1 - abar_t) ** 0.5 * prediction) / abar_t**0.5
        if clip is not None:
            pred_x_start = pred_x_start.clip(-clip, clip)
        first = max(t, 1)  # the variance of the last step is that of the step above
        tilde = betas[first] * (1 - abar[first - 1]) / (1 - abar[first])
        start, stay = abar_s**0.5 * betas[t] / (1 - abar_t), (1 - betas[t]) ** 0.5 * (1 - abar_s) / (1 - abar_t)
        unknown = min(1.0, (1 - abar_t) / abar_t * (1 - NOISE_ERROR[t]))
        values = output[:, SHAPE[1] :] if variance_type == "learned_range" else np.zeros(())
        variance = {
            "fixed_small": tilde,
            "fixed_large": betas[t] if t else tilde,
            "learned_range": np.exp((values + 1) / 2 * np.log(betas[t]) + (1 - values) / 2 * np.log(tilde)),
            "analytic": max(tilde, (tilde if t else 0.0) + start**2 * unknown),
        }[variance_type]
        mean, true_mean = start * pred_x_start + stay * x_t, start * x_start + stay * x_t
        if t:
            nats = 0.5 * (tilde / variance - 1 - np.log(tilde / variance) + (true_mean - mean) ** 2 / variance)
        else:
            upper = np.where(x_start > 0.999, np.inf, x_start + 1 / 255)
            lower = np.where(x_start < -0.999, -np.inf, x_start - 1 / 255)
            mass = stats.norm.cdf(upper, mean, variance**0.5) - stats.norm.cdf(lower, mean, variance**0.5)
            nats = -np.log(mass)
        vlb[:, t] = nats.reshape(len(x_start), -1).mean(axis=1) / LN2
        mse[:, t] = ((prediction - noise) ** 2).reshape(len(x_start), -1).mean(axis=1)
    prior = 0.5 * (abar[-1] * x_start**2 + 1 - abar[-1] - 1 - np.log(1 - abar[-1]))
    return {"prior": prior.reshape(len(x_start), -1).mean(axis=1) / LN2, "vlb": vlb, "mse": mse}


@pytest.mark.parametrize("variance_type", VARIANCES)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_every_term_is_the_textbooks(variance_type: str, clip: float | None) -> None:
    learned = variance_type == "learned_range"
    process = DiffusionConfig.from_dict(
        {
            "beta_schedule": "linear",
            "num_train_timesteps": T,
            "variance_type": variance_type,
            "analytic_noise_error": NOISE_ERROR if variance_type == "analytic" else None,
            "clip_sample_range": clip,
        }
    ).build()

    def denoise(x_t: torch.Tensor, timesteps: torch.Tensor, cond: str) -> torch.Tensor:
        assert cond == "a condition"
        return torch.from_numpy(network(x_t.numpy(), timesteps.numpy(), learned=learned))

    x_start = torch.linspace(-1, 1, math.prod(SHAPE), dtype=torch.float64).reshape(SHAPE)
    found = bits_per_dimension(denoise, x_start, process, streams(SHAPE[0]), "a condition")
    expected = reference(x_start.numpy(), variance_type, clip)
    np.testing.assert_allclose(found.prior.numpy(), expected["prior"], rtol=1e-9)
    np.testing.assert_allclose(found.mse_by_timestep.numpy(), expected["mse"], rtol=1e-9)
    np.testing.assert_allclose(found.vlb_by_timestep[:, 1:].numpy(), expected["vlb"][:, 1:], rtol=1e-9)
    # At t = 0 the tanh for the normal distribution is the difference.
    np.testing.assert_allclose(found.vlb_by_timestep[:, 0].numpy(), expected["vlb"][:, 0], rtol=0.03)
    torch.testing.assert_close(found.total, found.prior + found.vlb_by_timestep.sum(dim=1))


# --- Gaussian data ----------------------------------------------------------------------------------------------------

STD, STEPS, SAMPLES, DIMENSIONS = 0.2, 200, 64, 256


def gaussian_process(variance_type: str, **settings: Any) -> DiffusionProcess:
    noise_error = None
    if variance_type == "analytic":
        abar = DiffusionConfig(num_train_timesteps=STEPS, **settings).build().alphas_cumprod(torch.arange(STEPS))
        noise_error = tuple(((1 - abar) / (abar * STD**2 + 1 - abar)).tolist())
    return DiffusionConfig(
        num_train_timesteps=STEPS, variance_type=variance_type, analytic_noise_error=noise_error, **settings
    ).build()


def gaussian_likelihood(process: DiffusionProcess) -> Likelihood:
    """With the exact noise prediction of N(0, STD^2)."""

    def denoise(x_t: torch.Tensor, timesteps: torch.Tensor, cond: None) -> torch.Tensor:
        abar = process.alphas_cumprod(timesteps)[:, None]
        return (1 - abar).sqrt() * x_t / (abar * STD**2 + 1 - abar)

    x_start = STD * torch.randn(SAMPLES, DIMENSIONS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return bits_per_dimension(denoise, x_start, process, streams(SAMPLES), None)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "analytic"])
def test_gaussian_data_has_its_expected_terms(variance_type: str) -> None:
    """E KL(N(m, b), N(m', v)) = (b / v - 1 - log(b / v) + w^2 c / v) / 2, as m - m' = w (x_start - E[x_start | x_t]),
    whose variance is w^2 c."""
    process = gaussian_process(variance_type)
    found = gaussian_likelihood(process).vlb_by_timestep[:, 1:]
    abar = process.alphas_cumprod(torch.arange(STEPS))
    abar_t, abar_s = abar[1:], abar[:-1]
    beta = 1 - abar_t / abar_s
    b, w = beta * (1 - abar_s) / (1 - abar_t), abar_s.sqrt() * beta / (1 - abar_t)
    c = (1 - abar_t) * STD**2 / (abar_t * STD**2 + 1 - abar_t)
    v = {"fixed_small": b, "fixed_large": beta, "analytic": b + w**2 * c}[variance_type]
    expected = 0.5 * (b / v - 1 - (b / v).log() + w**2 * c / v) / LN2
    error = found.std(dim=0) / SAMPLES**0.5
    assert ((found.mean(dim=0) - expected).abs() < 5 * error + 1e-9).all()


def test_the_exact_model_costs_the_entropy_of_the_data() -> None:
    """A Gaussian chain that reverses the process exactly has a tight bound: the entropy of the Gaussian in bins of 2/255."""
    found = gaussian_likelihood(gaussian_process("analytic"))
    entropy = (0.5 * math.log(2 * math.pi * math.e * STD**2) - math.log(2 / 255)) / LN2
    error = float(found.total.std()) / SAMPLES**0.5
    # Within a bin the chain knows the sample too well, by 0.01 bits at this noise of the first step.
    assert -4 * error < float(found.total.mean()) - entropy < 4 * error + 0.01
    assert error < 0.02
    for variance_type in ("fixed_small", "fixed_large"):
        assert float((gaussian_likelihood(gaussian_process(variance_type)).total - found.total).mean()) > 0.01


def test_a_process_that_ends_in_pure_noise_has_nothing_to_pay_for_its_prior() -> None:
    settings = {"zero_terminal_snr": True, "prediction_type": "sample"}
    process = DiffusionConfig.from_dict({"num_train_timesteps": 50, **settings}).build()
    x_start = torch.linspace(-1, 1, 8).reshape(2, 4)
    found = bits_per_dimension(lambda x_t, timesteps, cond: 0.1 * x_t, x_start, process, streams(2), None)
    assert found.prior.tolist() == [0, 0]
    assert found.total.isfinite().all()
    assert found.vlb_by_timestep.shape == found.mse_by_timestep.shape == (2, 50)


def test_pixels_of_another_range_are_refused() -> None:
    """8-bit levels, pictures in [-3, 1], embeddings: their bound would be a number without meaning."""
    process = DiffusionConfig(num_train_timesteps=50).build()
    for wrong in (3.0, 255.0, math.nan):
        with pytest.raises(ValueError, match=rf"pixels in \[-1, 1\], but holds {wrong:.3g}"):
            bits_per_dimension(lambda x_t, timesteps, cond: x_t, -wrong * torch.ones(1, 4), process, streams(1), None)
