"""Resizing and cropping of (H, W, 3) uint8 pictures: pure functions, random ones keyed by (seed, position)."""

from __future__ import annotations

import numpy as np
from PIL import Image

from unclip.data.decode import Picture

CROP_STREAM = 0
DEGRADATION_STREAM = 1


def sample_rng(seed: int, position: int, stream: int) -> np.random.Generator:
    """The random numbers of one purpose (`stream`) for the sample at `position` of a run; the same on any worker."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, position, stream])))


def resize_square(image: Picture, size: int) -> Picture:
    """Centre-crops to a square and resizes it to (size, size, 3): halved by area while that is enough, then bicubic."""
    height, width = image.shape[:2]
    if height == width == size:
        return image
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    resized = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
    return np.asarray(resized)


def area_downscale(image: Picture, size: int) -> Picture:
    """(size, size, 3): the rounded mean of each block of a square picture whose side is a multiple of `size`.

    Raises `ValueError` for other shapes.
    """
    height, width = image.shape[:2]
    if height != width or height % size:
        raise ValueError(f"a picture of {width}x{height} cannot be scaled down evenly to {size}x{size}")
    return image if height == size else np.asarray(Image.fromarray(image).reduce(height // size))


def random_crop(image: Picture, size: int, rng: np.random.Generator) -> Picture:
    """A (size, size, 3) part of the picture, every place equally likely.

    Raises `ValueError` where the picture is smaller.
    """
    height, width = image.shape[:2]
    if min(height, width) < size:
        raise ValueError(f"a picture of {width}x{height} has no crop of {size}x{size}")
    top = int(rng.integers(height - size + 1))
    left = int(rng.integers(width - size + 1))
    return image[top : top + size, left : left + size]
