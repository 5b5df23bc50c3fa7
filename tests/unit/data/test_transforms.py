"""Resizing and cropping against direct computation."""

from __future__ import annotations

import numpy as np
import pytest

from unclip.data.transforms import area_downscale, random_crop, resize_square, sample_rng


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    channels = [127 + 100 * np.sin(x / 20), 127 + 100 * np.cos(y / 15), 255 * x / width]
    return np.stack(channels, axis=-1).astype(np.uint8)


def test_resize_square_takes_the_centre_and_keeps_the_mean() -> None:
    picture = smooth(96, 160)
    resized = resize_square(picture, 24)
    assert resized.shape == (24, 24, 3)
    blocks = picture[:, 32:128].reshape(24, 4, 24, 4, 3).mean(axis=(1, 3))
    assert np.abs(resized - blocks).mean() < 1.0


def test_resize_square_leaves_the_right_size_alone() -> None:
    picture = smooth(32, 32)
    np.testing.assert_array_equal(resize_square(picture, 32), picture)


def test_resize_has_no_aliasing() -> None:
    """A fine checkerboard becomes grey; without antialiasing it would stay black and white."""
    board = (np.indices((128, 128)).sum(axis=0) % 2 * 255).astype(np.uint8)
    resized = resize_square(np.repeat(board[:, :, None], 3, axis=2), 48)
    assert np.abs(resized.astype(int) - 127).max() < 16


def test_area_downscale_is_the_rounded_block_mean() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    exact = picture.reshape(8, 4, 8, 4, 3).mean(axis=(1, 3))
    assert np.abs(area_downscale(picture, 8) - exact).max() <= 0.5 + 1e-6
    with pytest.raises(ValueError, match="32x32 cannot be scaled down evenly to 12x12"):
        area_downscale(picture, 12)


def test_random_crop_reaches_every_place_and_only_depends_on_its_key() -> None:
    picture = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    corners = set()
    for position in range(300):
        crop = random_crop(picture, 6, sample_rng(0, position, 0))
        np.testing.assert_array_equal(crop, random_crop(picture, 6, sample_rng(0, position, 0)))
        corners.add(int(crop[0, 0, 0]))
    assert corners == {int(picture[y, x, 0]) for y in range(3) for x in range(3)}
    with pytest.raises(ValueError, match="8x8 has no crop of 9x9"):
        random_crop(picture, 9, sample_rng(0, 0, 0))


def test_streams_differ_by_seed_position_and_purpose() -> None:
    draws = {float(sample_rng(s, p, k).random()) for s in range(3) for p in range(3) for k in range(2)}
    assert len(draws) == 18
