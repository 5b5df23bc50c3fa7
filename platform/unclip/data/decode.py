"""Encoded pictures to RGB arrays, whatever their mode, orientation or size; nothing is decoded that is too large."""

from __future__ import annotations

import io
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

DEFAULT_MAX_PIXELS = 1 << 26
"""67 million: a picture of 8192 by 8192."""

Picture = npt.NDArray[np.uint8]
"""(H, W, 3) uint8 RGB."""


class DecodeError(ValueError):
    """A picture cannot be used; the message is the reason, fit for a quarantine table."""


def decode_image(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS, target: int | None = None) -> Picture:
    """Decodes a picture to (H, W, 3) uint8 RGB: first frame, upright by its EXIF tag, transparency on white.

    Args:
        max_pixels: larger pictures are refused by their header, before a pixel is decoded.
        target: where the short side is only wanted at this many pixels, a JPEG is decoded at the smallest of
            1/1, 1/2, 1/4, 1/8 that is not below it, which is several times faster.

    Raises `DecodeError` with the reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own bound follows
            image = Image.open(io.BytesIO(data))
        width, height = image.size
        if width * height > max_pixels:
            raise DecodeError(f"{width}x{height} pixels: more than {max_pixels}")
        if target is not None:
            image.draft(None, (target, target))
        return np.ascontiguousarray(_to_rgb(ImageOps.exif_transpose(image)))
    except DecodeError:
        raise
    except Exception as error:  # on broken bytes the many decoders raise errors of any kind
        raise DecodeError(f"not a readable picture: {type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Picture:
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.mode == "F":
        raise DecodeError("floating point pixels have no agreed range")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(opaque, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _from_16_bit(image: Image.Image) -> Picture:
    """16-bit grey by its high byte; Pillow's own conversion would clip everything above 255 to white."""
    high = (np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)
    return np.repeat(high[:, :, None], 3, axis=2)
