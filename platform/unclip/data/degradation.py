"""How the low-resolution condition of an upsampler is made and corrupted in training.

unCLIP section 2.1: the 64->256 stage sees its condition through a Gaussian blur, the 256->1024 stage through a "more
diverse" BSR degradation (Zhang et al. 2021, "Designing a practical degradation model for deep blind image
super-resolution"; as used by Rombach et al. 2022). The papers do not say how often a sample is corrupted: that is a
parameter here.
"""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from unclip.data.decode import Picture
from unclip.data.transforms import area_downscale

Degradation = Literal["none", "blur", "bsr"]
Floats = npt.NDArray[np.float32]

BLUR_KERNEL = 3
BLUR_SIGMA = 0.6
_FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.BOX)


def make_low_res(
    image: Picture, size: int, *, degradation: Degradation, probability: float, rng: np.random.Generator
) -> Picture:
    """The (size, size, 3) uint8 condition for a square picture whose side is a multiple of `size`.

    The one way a condition is made: the area mean, rounded to 8 bits ("none": what evaluation uses), which in training
    is blurred or replaced by a BSR-degraded one with `probability`.
    """
    if degradation == "none" or rng.random() >= probability:
        return area_downscale(image, size)
    if degradation == "blur":
        return _to_uint8(gaussian_blur(_to_float(area_downscale(image, size))))
    return bsr_degrade(image, image.shape[0] // size, rng)


def gaussian_blur(image: Floats, kernel: int = BLUR_KERNEL, sigma: float = BLUR_SIGMA) -> Floats:
    """Blurs (H, W, C) with a normalised Gaussian of `kernel` taps (odd) and `sigma` pixels; edges are mirrored."""
    offsets = np.arange(kernel) - kernel // 2
    taps = np.exp(-0.5 * (offsets / sigma) ** 2)
    taps /= taps.sum()
    from scipy import ndimage  # here: a second of imports that most stages' data workers can do without

    blurred = ndimage.correlate1d(image, taps, axis=0, mode="mirror")
    return np.asarray(ndimage.correlate1d(blurred, taps, axis=1, mode="mirror"), dtype=np.float32)


def bsr_degrade(image: Picture, factor: int, rng: np.random.Generator) -> Picture:
    """A random degradation of (H, W, 3) uint8 to (H/factor, W/factor, 3): BSR, all but its sensor noise.

    With factor 4, one time in four the picture is first halved. Then, in random order: two Gaussian blurs, a random
    shrinking (always before) the resize to the final size, Gaussian noise and JPEG. JPEG once more at the end.

    Raises `ValueError` where a side is no multiple of `factor`.
    """
    height, width = image.shape[0] // factor, image.shape[1] // factor
    if (height * factor, width * factor) != image.shape[:2]:
        raise ValueError(f"a picture of {image.shape[1]}x{image.shape[0]} cannot be degraded by a factor of {factor}")
    pixels = _to_float(image)
    if factor == 4 and rng.random() < 0.25:
        pixels = _resize(pixels, image.shape[0] // 2, image.shape[1] // 2, rng)
        factor = 2
    for step in _random_steps(rng):
        if step == "blur":
            pixels = _random_blur(pixels, factor, rng)
        elif step == "shrink":
            pixels = _random_shrink(pixels, factor, rng)
        elif step == "resize":
            pixels = _resize(pixels, height, width, rng)
        elif step == "noise":
            pixels = _random_noise(pixels, rng)
        elif rng.random() < 0.9:
            pixels = _jpeg(pixels, int(rng.integers(30, 96)))
    return _to_uint8(_jpeg(pixels, int(rng.integers(30, 96))))


def _random_steps(rng: np.random.Generator) -> list[str]:
    steps = list(rng.permutation(["blur", "blur", "shrink", "resize", "noise", "jpeg"]))
    shrink, resize = steps.index("shrink"), steps.index("resize")
    if shrink > resize:
        steps[shrink], steps[resize] = steps[resize], steps[shrink]
    return [str(step) for step in steps]


def _random_blur(pixels: Floats, factor: int, rng: np.random.Generator) -> Floats:
    """An isotropic or anisotropic Gaussian of 7 to 25 taps, wider for larger factors."""
    taps = 2 * int(rng.integers(2, 12)) + 3
    if rng.random() < 0.5:
        deviation = (2.0 + 0.2 * factor) * rng.uniform(0.05, 1.0)
        return gaussian_blur(pixels, taps, deviation)
    variances = (4.0 + factor) * rng.uniform(0.01, 1.0, size=2)
    return _convolve(pixels, _gaussian_kernel(taps, variances, rng.uniform(0.0, np.pi)))


def _random_shrink(pixels: Floats, factor: int, rng: np.random.Generator) -> Floats:
    height, width = pixels.shape[:2]
    if rng.random() < 0.75:
        divisor = rng.uniform(1.0, 2.0 * factor)
        return _resize(pixels, max(1, int(height / divisor)), max(1, int(width / divisor)), rng)
    # Every factor-th pixel after a Gaussian whose centre sits on the middle of the block that the pixel stands for.
    variance = rng.uniform(0.1, 0.6 * factor) ** 2
    kernel = _gaussian_kernel(25, np.array([variance, variance]), 0.0, shift=(factor - 1) / 2)
    return _convolve(pixels, kernel)[::factor, ::factor]


def _random_noise(pixels: Floats, rng: np.random.Generator) -> Floats:
    """Standard deviation 2 to 25 of 255: independent in each channel (0.4), grey (0.4) or correlated channels (0.2)."""
    deviation = rng.integers(2, 26) / 255.0
    kind = rng.random()
    height, width = pixels.shape[:2]
    if kind < 0.4:
        noise = rng.standard_normal((height, width, 3))
    elif kind < 0.8:
        noise = rng.standard_normal((height, width, 1))
    else:
        mixing = rng.standard_normal((3, 3))
        mixing /= np.linalg.norm(mixing, axis=0, keepdims=True)  # unit variance in each channel
        noise = rng.standard_normal((height, width, 3)) @ mixing
    return np.clip(pixels + deviation * noise, 0.0, 1.0).astype(np.float32)


def _gaussian_kernel(taps: int, variances: npt.NDArray[np.float64], angle: float, shift: float = 0.0) -> Floats:
    """(taps, taps) normalised Gaussian: variances along axes turned by `angle`, centre moved by `shift`."""
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    precision = turn @ np.diag(1.0 / variances) @ turn.T
    offsets = np.arange(taps) - taps // 2 - shift
    grid = np.stack(np.meshgrid(offsets, offsets, indexing="ij"), axis=-1)
    kernel = np.exp(-0.5 * np.einsum("...i,ij,...j->...", grid, precision, grid))
    return np.asarray(kernel / kernel.sum(), dtype=np.float32)


def _convolve(pixels: Floats, kernel: Floats) -> Floats:
    """Correlation with mirrored edges; by FFT, since kernels have up to 25 x 25 taps."""
    pad = kernel.shape[0] // 2
    padded = np.pad(pixels, ((pad, pad), (pad, pad), (0, 0)), mode="symmetric")
    flipped = np.ascontiguousarray(kernel[::-1, ::-1, None])
    from scipy.signal import fftconvolve

    return np.asarray(fftconvolve(padded, flipped, mode="valid", axes=(0, 1)), dtype=np.float32)


def _resize(pixels: Floats, height: int, width: int, rng: np.random.Generator) -> Floats:
    """Bilinear, bicubic or area, each equally likely."""
    method = _FILTERS[rng.integers(len(_FILTERS))]
    planes = [Image.fromarray(np.ascontiguousarray(pixels[:, :, channel])) for channel in range(3)]
    resized = [np.asarray(plane.resize((width, height), method)) for plane in planes]
    return np.clip(np.stack(resized, axis=-1), 0.0, 1.0)


def _jpeg(pixels: Floats, quality: int) -> Floats:
    buffer = io.BytesIO()
    Image.fromarray(_to_uint8(pixels)).save(buffer, "JPEG", quality=quality)
    return _to_float(np.asarray(Image.open(buffer)))


def _to_float(image: Picture) -> Floats:
    return image.astype(np.float32) / 255.0


def _to_uint8(pixels: Floats) -> Picture:
    return np.asarray(np.rint(np.clip(pixels, 0.0, 1.0) * 255.0), dtype=np.uint8)
