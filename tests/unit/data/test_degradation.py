"""Low-resolution conditions: closed forms for the plain and blurred ones, invariants of the random degradation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import gaussian_blur as torchvision_blur

from unclip.data.degradation import _gaussian_kernel, bsr_degrade, gaussian_blur, make_low_res
from unclip.data.transforms import area_downscale, sample_rng


def picture(side: int = 64) -> np.ndarray:
    y, x = np.mgrid[0:side, 0:side] / side
    channels = [200 * x + 20, 255 * ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1), 255 * (y > 0.5)]
    return np.stack(channels, axis=-1).astype(np.uint8)


@pytest.mark.parametrize(("kernel", "sigma"), [(3, 0.6), (9, 2.0)])
def test_blur_agrees_with_torchvision(kernel: int, sigma: float) -> None:
    pixels = np.random.default_rng(0).random((16, 20, 3), dtype=np.float32)
    expected = torchvision_blur(torch.from_numpy(pixels).permute(2, 0, 1), [kernel, kernel], [sigma, sigma])
    torch.testing.assert_close(
        torch.from_numpy(gaussian_blur(pixels, kernel, sigma)).permute(2, 0, 1), expected, atol=1e-6, rtol=0
    )


def test_without_degradation_it_is_the_area_mean_and_draws_nothing() -> None:
    rng = sample_rng(0, 0, 1)
    low_res = make_low_res(picture(), 16, degradation="none", probability=1.0, rng=rng)
    np.testing.assert_array_equal(low_res, area_downscale(picture(), 16))
    assert rng.random() == sample_rng(0, 0, 1).random()


@pytest.mark.parametrize("degradation", ["blur", "bsr"])
def test_probability_is_the_share_of_corrupted_samples(degradation: str) -> None:
    plain = area_downscale(picture(), 16)
    made = [
        make_low_res(picture(), 16, degradation=degradation, probability=0.5, rng=sample_rng(0, i, 1))
        for i in range(200)
    ]
    assert np.mean([np.array_equal(low_res, plain) for low_res in made]) == pytest.approx(0.5, abs=0.1)
    never = make_low_res(picture(), 16, degradation=degradation, probability=0.0, rng=sample_rng(0, 0, 1))
    np.testing.assert_array_equal(never, plain)


def test_blurred_condition_is_the_blur_of_the_area_mean() -> None:
    low_res = make_low_res(picture(), 16, degradation="blur", probability=1.0, rng=sample_rng(0, 0, 1))
    exact = 255.0 * gaussian_blur(area_downscale(picture(), 16).astype(np.float32) / 255.0)
    assert np.abs(low_res - exact).max() <= 0.5 + 1e-3
    assert not np.array_equal(low_res, area_downscale(picture(), 16))


@pytest.mark.parametrize("factor", [2, 4])
def test_bsr_keeps_the_scene_and_its_size(factor: int) -> None:
    """Every degraded picture is a recognisable, aligned, but different version of the plain one."""
    plain = area_downscale(picture(), 64 // factor).astype(float)
    distances = []
    for index in range(40):
        degraded = bsr_degrade(picture(), factor, sample_rng(1, index, 1))
        assert degraded.shape == plain.shape
        assert degraded.dtype == np.uint8
        np.testing.assert_array_equal(degraded, bsr_degrade(picture(), factor, sample_rng(1, index, 1)))
        assert np.corrcoef(degraded.ravel(), plain.ravel())[0, 1] > 0.7
        distances.append(np.abs(degraded - plain).mean())
    assert min(distances) > 0.5
    assert np.std(distances) > 2.0  # many strengths, not one


def test_bsr_does_not_shift_or_tint_on_average() -> None:
    plain = area_downscale(picture(), 16).astype(float)
    mean = np.mean([bsr_degrade(picture(), 4, sample_rng(2, index, 1)) for index in range(150)], axis=0)
    assert np.abs(mean.mean(axis=(0, 1)) - plain.mean(axis=(0, 1))).max() < 6
    errors = {}
    for shift in (-1, 0, 1):
        moved = np.roll(plain, shift, axis=(0, 1))
        errors[shift] = np.abs(mean - moved)[2:-2, 2:-2].mean()
    assert errors[0] < min(errors[-1], errors[1])
    assert abs(errors[-1] - errors[1]) < 0.25 * errors[1]  # a half-pixel shift would favour one side


def test_bsr_refuses_uneven_sides() -> None:
    with pytest.raises(ValueError, match="62x62 cannot be degraded by a factor of 4"):
        bsr_degrade(picture()[:62, :62], 4, sample_rng(0, 0, 1))


def test_anisotropic_kernel_has_the_asked_moments() -> None:
    kernel = _gaussian_kernel(25, np.array([6.0, 2.0]), 0.5).astype(np.float64)
    offsets = np.arange(25) - 12
    assert kernel.sum() == pytest.approx(1.0, abs=1e-5)
    y = (kernel * offsets[:, None] ** 2).sum()
    x = (kernel * offsets[None, :] ** 2).sum()
    assert y + x == pytest.approx(8.0, rel=0.01)
    assert y == pytest.approx(6.0 * np.cos(0.5) ** 2 + 2.0 * np.sin(0.5) ** 2, rel=0.01)
