"""Beta schedules against their closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from unclip.diffusion.schedules import beta_schedule


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


@pytest.mark.parametrize("num_train_timesteps", [50, 250, 4000])
def test_linear_ends_at_about_the_same_noise_for_every_length(num_train_timesteps: int) -> None:
    log_abar = (1 - beta_schedule("linear", num_train_timesteps)).log().sum()
    integral = -(0.1 + 20) / 2  # of the continuous process, log abar = -integral of beta(t)
    assert abs(log_abar - integral) < 0.5 * 20**2 / num_train_timesteps


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
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
    with pytest.raises(ValueError, match="not 'sigmoid'"):
        beta_schedule("sigmoid", 1000)  # type: ignore[arg-type]
