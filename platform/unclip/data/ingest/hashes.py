"""What tells two pictures are the same: a hash of the pixels, and one that small changes leave nearly alone."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
from PIL import Image

GREY_SIDE = 32
"""Side of the grey picture that a perceptual hash is made of."""

_STRIP_BYTES = 1 << 16
_KEPT = 8  # lowest frequencies of each axis: 8 * 8 bits
_BASIS_BITS = 16
_FLAT = 8.0  # the DCT coefficient of a wave of half a grey level


def content_hash(image: Image.Image) -> bytes:
    """SHA-256 (32 bytes) of an RGB picture's width, height and pixels: the same in any lossless container."""
    digest = hashlib.sha256(b"%d %d " % image.size)
    width, height = image.size
    rows = max(1, _STRIP_BYTES // (3 * width))
    for top in range(0, height, rows):  # in strips that stay in the cache: twice as fast, and no second copy of it all
        digest.update(image.crop((0, top, width, min(top + rows, height))).tobytes())
    return digest.digest()


def grey_thumbnail(image: Image.Image) -> npt.NDArray[np.uint8]:
    """(32, 32) uint8 luma of an RGB picture, averaged over the pixels that each value stands for."""
    size = (GREY_SIDE, GREY_SIDE)
    small = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.asarray(small.convert("L"))


def perceptual_hashes(greys: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """64-bit DCT hashes (Zauner 2010's pHash, with the changes named here) of grey pictures (N, 32, 32) uint8: (N,).

    Of the orthonormal 2-D DCT-II of the grey values less 128, the 8 by 8 lowest frequencies give one bit each,
    row by row from the most significant: is it above the median of the 63 without the constant one? Coefficients below
    8, a wave of half a grey level, count as 0, so that bits of flat areas do not depend on noise. The integer basis
    keeps every sum below 2**53: float64 is exact and hashes are equal on all machines.
    """
    basis = _basis()
    scaled = basis @ (greys.astype(np.float64) - 128.0) @ basis.T
    coefficients = (scaled / 2.0 ** (2 * _BASIS_BITS)).reshape(len(greys), _KEPT * _KEPT)
    coefficients[np.abs(coefficients) < _FLAT] = 0.0
    median = np.median(coefficients[:, 1:], axis=1, keepdims=True)
    bits = np.packbits(coefficients > median, axis=1)
    return bits.view(">u8")[:, 0].astype(np.uint64)


def _basis() -> npt.NDArray[np.float64]:
    """(8, 32): the lowest rows of the orthonormal DCT-II, times 2**16 and rounded."""
    frequency, place = np.mgrid[0:_KEPT, 0:GREY_SIDE]
    waves = np.cos(np.pi * frequency * (2 * place + 1) / (2 * GREY_SIDE)) * np.sqrt(2.0 / GREY_SIDE)
    waves[0] /= np.sqrt(2.0)
    return np.asarray(np.rint(waves * 2.0**_BASIS_BITS), dtype=np.float64)
