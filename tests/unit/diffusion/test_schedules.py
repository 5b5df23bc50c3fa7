"""Beta schedules against their closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from unclip.diffusion.schedules import beta_schedule, rescale_zero_terminal_snr

SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]


def test_cosine_alphas_cumprod_are_the_closed_form() -> None:
    alphas_cumprod = (1 - beta_schedule("squaredcos_cap_v2", 1000)).cumprod(dim=0)
    ratios = [math.cos(((t + 1) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(999)]
    expected = torch.tensor(ratios, dtype=torch.float64) / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(alphas_cumprod[:999], expected, rtol=1e-10, atol=0)


def test_cosine_caps_the_last_beta() -> None:
    betas = beta_schedule("squaredcos_cap_v2", 1000)
    assert betas[-1] == 0.999
    assert (betas[:-1] < 0.999).all()
    assert beta_schedule("squaredcos_cap_v2", 1).tolist() == [0.999]


def test_linear_is_the_papers() -> None:
    np.testing.assert_allclose(beta_schedule("linear", 1000).numpy(), np.linspace(1e-4, 0.02, 1000), rtol=1e-12)


def test_scaled_linear_is_latent_diffusions() -> None:
    expected = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    np.testing.assert_allclose(beta_schedule("scaled_linear", 1000).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("num_train_timesteps", [50, 250, 4000])
def test_linear_ends_at_about_the_same_noise_for_every_length(num_train_timesteps: int) -> None:
    log_abar = (1 - beta_schedule("linear", num_train_timesteps)).log().sum()
    integral = -(0.1 + 20) / 2  # of the continuous process, log abar = -integral of beta(t)
    assert abs(log_abar - integral) < 0.5 * 20**2 / num_train_timesteps


@pytest.mark.parametrize("num_train_timesteps", [50, 250, 4000])
def test_scaled_linear_ends_at_about_the_same_noise_for_every_length(num_train_timesteps: int) -> None:
    log_abar = (1 - beta_schedule("scaled_linear", num_train_timesteps)).log().sum()
    low, high = 0.85**0.5, 12**0.5  # roots of beta(0) and beta(1) of the continuous process
    integral = -(low**2 + low * high + high**2) / 3
    assert abs(log_abar - integral) < 0.5 * 12**2 / num_train_timesteps


@pytest.mark.parametrize("name", SCHEDULES)
def test_betas_are_float64_rising_and_between_0_and_1(name) -> None:
    betas = beta_schedule(name, 100)
    assert betas.dtype == torch.float64
    assert ((betas > 0) & (betas < 1)).all()
    assert (betas.diff() > 0).all()


def test_tables_are_real_under_a_meta_device() -> None:
    with torch.device("meta"):
        assert beta_schedule("linear", 100).device.type == "cpu"
        assert beta_schedule("squaredcos_cap_v2", 100).device.type == "cpu"


def test_bad_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="num_train_timesteps must be at least 1, not 0"):
        beta_schedule("linear", 0)
    with pytest.raises(ValueError, match="num_train_timesteps = 20: beta_schedule linear needs more than 20"):
        beta_schedule("linear", 20)
    with pytest.raises(ValueError, match="num_train_timesteps = 12: beta_schedule scaled_linear needs more than 12"):
        beta_schedule("scaled_linear", 12)
    assert beta_schedule("scaled_linear", 13).max() < 1
    with pytest.raises(ValueError, match="not 'sigmoid'"):
        beta_schedule("sigmoid", 1000)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SCHEDULES)
def test_zero_terminal_snr_keeps_the_first_signal_and_takes_away_the_last(name) -> None:
    """Algorithm 1 of Lin et al. 2023: the signal sqrt(abar) is an affine function of what it was."""
    before = (1 - beta_schedule(name, 500)).cumprod(dim=0)
    after = rescale_zero_terminal_snr(before)
    assert after[-1] == 0
    torch.testing.assert_close(after[0], before[0], rtol=1e-14, atol=0)
    assert (after.diff() < 0).all()
    slopes = after.sqrt().diff() / before.sqrt().diff()
    torch.testing.assert_close(slopes, slopes[:1].expand_as(slopes), rtol=1e-7, atol=0)


def test_zero_terminal_snr_needs_two_timesteps() -> None:
    with pytest.raises(ValueError, match="zero_terminal_snr needs num_train_timesteps of at least 2, not 1"):
        rescale_zero_terminal_snr(torch.tensor([0.5]))
