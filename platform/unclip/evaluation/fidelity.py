"""How near pictures are to those they should be: pixel by pixel, and in colour. All sums are in float64."""

from __future__ import annotations

import torch
from torch.nn import functional

LARGEST_PSNR = 100.0
"""That of pictures without a difference, which have no finite one."""
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
"""Taps and standard deviation, in pixels, of the Gaussian that SSIM's local statistics are taken under."""
_SSIM_K1, _SSIM_K2 = 0.01, 0.03
_PEAK = 255.0


def peak_signal_to_noise(pictures: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """(B,) dB of uint8 (B, H, W, 3): 10 log10(255^2 / mean squared error)."""
    error = (pictures.double() - real.double()).square().flatten(1).mean(dim=1)
    return (10 * torch.log10(_PEAK**2 / error)).clamp(max=LARGEST_PSNR)


def structural_similarity(pictures: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """(B,) SSIM of uint8 (B, H, W, 3), sides at least 11 (Wang et al. 2004, "Image Quality Assessment", equation 13).

    The mean over the three channels and all places where the window lies inside the picture. 1 for equal pictures.
    """
    x, y = (picture.double().movedim(3, 1) for picture in (pictures, real))
    mean_x, mean_y = _local_mean(x), _local_mean(y)
    variance_x, variance_y = _local_mean(x * x) - mean_x**2, _local_mean(y * y) - mean_y**2
    covariance = _local_mean(x * y) - mean_x * mean_y
    c1, c2 = (_SSIM_K1 * _PEAK) ** 2, (_SSIM_K2 * _PEAK) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).flatten(1).mean(dim=1)


def colour_drift(pictures: torch.Tensor, real: torch.Tensor) -> dict[str, torch.Tensor]:
    """By how much pictures, uint8 (B, H, W, 3), are brighter or more colourful than the real ones, on the mean; (B,) each.

    `red`, `green`, `blue`: in levels of 255. `saturation`: of HSV, from -1 to 1.
    """
    x, y = pictures.double(), real.double()
    levels = (x - y).flatten(1, 2).mean(dim=1)
    drift = dict(zip(("red", "green", "blue"), levels.unbind(dim=1), strict=True))
    return drift | {"saturation": _saturation(x) - _saturation(y)}


def _saturation(pixels: torch.Tensor) -> torch.Tensor:
    """(B,) means of HSV's saturation, (greatest - least) / greatest of the channels; black has none."""
    most, least = pixels.amax(dim=3), pixels.amin(dim=3)
    return ((most - least) / most.clamp(min=1)).flatten(1).mean(dim=1)


def _local_mean(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) under the window -> (B, C, H - 10, W - 10)."""
    offsets = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - SSIM_WINDOW // 2
    taps = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    taps /= taps.sum()
    planes = x.flatten(0, 1)[:, None]
    planes = functional.conv2d(functional.conv2d(planes, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))
    return planes[:, 0].unflatten(0, x.shape[:2])
