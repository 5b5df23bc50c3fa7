"""Hashes of pictures against SciPy's DCT, and against what happens to pictures on the web."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
from PIL import Image
from scipy.fft import dctn

from unclip.data.ingest.hashes import content_hash, grey_thumbnail, perceptual_hashes


def drawing(seed: int, width: int = 320, height: int = 240) -> Image.Image:
    """A smooth picture with structure at many scales."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3))
    for side in (3, 6, 12, 40):
        noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        picture += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), dtype=float)
    return Image.fromarray((picture / 4).astype(np.uint8))


def phash(*images: Image.Image) -> np.ndarray:
    return perceptual_hashes(np.stack([grey_thumbnail(image) for image in images]))


def distance(first: Image.Image, second: Image.Image) -> int:
    a, b = phash(first, second)
    return int(a ^ b).bit_count()


def saved(image: Image.Image, form: str, **options: object) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return Image.open(buffer).convert("RGB")


def test_perceptual_hash_is_the_sign_of_scipys_dct() -> None:
    greys = np.random.default_rng(0).integers(0, 256, (200, 32, 32), dtype=np.uint8)
    bits = np.unpackbits(perceptual_hashes(greys).astype(">u8").view(np.uint8)).reshape(200, 64).astype(bool)
    coefficients = dctn(greys.astype(float) - 128, axes=(1, 2), norm="ortho")[:, :8, :8].reshape(200, 64)
    coefficients[np.abs(coefficients) < 8] = 0
    above = coefficients - np.median(coefficients[:, 1:], axis=1, keepdims=True)
    clear = (np.abs(above) > 0.01) | (above == 0)  # the integer basis is off by less
    np.testing.assert_array_equal(bits[clear], above[clear] > 0)
    assert clear.mean() > 0.99


@pytest.mark.parametrize("seed", range(8))
def test_the_same_picture_stays_within_a_few_bits(seed: int) -> None:
    image = drawing(seed)
    assert distance(image, saved(image, "PNG")) == 0
    assert distance(image, saved(image, "JPEG", quality=60)) <= 4
    assert distance(image, saved(image, "WEBP", quality=60)) <= 4
    assert distance(image, image.resize((160, 120), Image.Resampling.LANCZOS)) <= 4
    assert distance(image, image.resize((700, 525), Image.Resampling.BICUBIC)) <= 4
    assert distance(image, Image.eval(image, lambda value: value * 0.9 + 10)) <= 4


def test_other_pictures_are_far() -> None:
    hashes = phash(*(drawing(seed) for seed in range(40)))
    distances = [int(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(distances) > 10
    assert 28 < np.mean(distances) < 36


def test_noise_in_a_flat_picture_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    flat = np.full((200, 200, 3), 200, np.int64)
    noisy = [Image.fromarray((flat + rng.integers(-2, 3, flat.shape)).astype(np.uint8)) for _ in range(5)]
    assert len(set(phash(Image.fromarray(flat.astype(np.uint8)), *noisy).tolist())) == 1


def test_no_pictures_no_hashes() -> None:
    assert perceptual_hashes(np.zeros((0, 32, 32), np.uint8)).shape == (0,)


def test_content_hash_is_of_pixels_and_shape_alone() -> None:
    image = drawing(1, 24, 12)
    original = content_hash(image)
    assert original == hashlib.sha256(b"24 12 " + np.asarray(image).tobytes()).digest()
    large = drawing(2, 401, 307)
    assert content_hash(large) == hashlib.sha256(b"401 307 " + np.asarray(large).tobytes()).digest()
    assert content_hash(saved(image, "PNG")) == content_hash(saved(image, "WEBP", lossless=True)) == original
    assert content_hash(Image.fromarray(np.asarray(image).reshape(24, 12, 3))) != original
    changed = np.array(image)
    changed[5, 7, 1] ^= 1
    assert content_hash(Image.fromarray(changed)) != original
