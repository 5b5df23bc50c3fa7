"""PSNR, SSIM and colour drift where they are known, and against their formulas window by window."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
import torch

from unclip.evaluation.fidelity import colour_drift, peak_signal_to_noise, structural_similarity


def pictures(seed: int, count: int = 2, side: int = 16) -> torch.Tensor:
    values = torch.randint(0, 256, (count, side, side, 3), generator=torch.Generator().manual_seed(seed))
    return values.to(torch.uint8)


def test_the_signal_to_noise_ratio_is_its_definition() -> None:
    real = torch.zeros(3, 4, 4, 3, dtype=torch.uint8)
    changed = real.clone()
    changed[1] += 5
    changed[2, :2] = 255
    expected = [100.0, 20 * math.log10(255 / 5), 10 * math.log10(2)]
    assert peak_signal_to_noise(changed, real).tolist() == pytest.approx(expected)


def test_noise_of_a_known_strength_has_its_ratio() -> None:
    noise = torch.randn(1, 256, 256, 3, generator=torch.Generator().manual_seed(0)) * 12
    real = torch.full_like(noise, 128).to(torch.uint8)
    # Rounding to 8 bits adds the variance of a uniform error, 1/12.
    expected = 10 * math.log10(255**2 / (12**2 + 1 / 12))
    noisy = (real + noise).round().clamp(0, 255).to(torch.uint8)
    assert peak_signal_to_noise(noisy, real).item() == pytest.approx(expected, abs=0.05)


def test_similarity_is_that_of_every_window() -> None:
    x, y = pictures(0), (pictures(0).double() * 0.6 + pictures(1).double() * 0.4).to(torch.uint8)
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    found = structural_similarity(x, y)
    for row in range(2):
        values = []
        for channel in range(3):
            a, b = (picture[row, :, :, channel].double().numpy() for picture in (x, y))
            for top in range(6):
                for left in range(6):
                    p, q = a[top : top + 11, left : left + 11], b[top : top + 11, left : left + 11]
                    mean_p, mean_q = (window * p).sum(), (window * q).sum()
                    variances = (window * (p - mean_p) ** 2).sum() + (window * (q - mean_q) ** 2).sum()
                    covariance = (window * (p - mean_p) * (q - mean_q)).sum()
                    c1, c2 = 2.55**2, 7.65**2
                    values.append(
                        (2 * mean_p * mean_q + c1)
                        * (2 * covariance + c2)
                        / ((mean_p**2 + mean_q**2 + c1) * (variances + c2))
                    )
        assert found[row].item() == pytest.approx(np.mean(values), rel=1e-9)
    assert structural_similarity(x, x).tolist() == pytest.approx([1, 1])


def test_similarity_of_flat_pictures_is_that_of_their_brightness() -> None:
    x, y = (torch.full((1, 12, 12, 3), level, dtype=torch.uint8) for level in (100, 150))
    expected = (2 * 100 * 150 + 2.55**2) / (100**2 + 150**2 + 2.55**2)
    assert structural_similarity(x, y).item() == pytest.approx(expected)


def test_drift_is_the_mean_difference_of_channels_and_of_saturation() -> None:
    x, y = pictures(2, side=12), pictures(3, side=12)
    x[0, :3] = 0  # black has no saturation
    drift = colour_drift(x, y)
    for row in range(2):
        for channel, name in enumerate(("red", "green", "blue")):
            expected = x[row, ..., channel].double().mean() - y[row, ..., channel].double().mean()
            assert drift[name][row].item() == pytest.approx(expected.item())
        saturations = [
            np.mean([colorsys.rgb_to_hsv(*(pixel / 255))[1] for pixel in picture[row].reshape(-1, 3).numpy()])
            for picture in (x, y)
        ]
        assert drift["saturation"][row].item() == pytest.approx(saturations[0] - saturations[1])
