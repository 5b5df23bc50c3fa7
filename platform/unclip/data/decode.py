"""Encoded pictures to upright RGB, whatever their mode, orientation or size; nothing is decoded that is too large.

Ingest and the training stream both decode here, so what was let in can be trained on. Colour profiles are ignored:
pixels count as sRGB. Of animations and multi-page files the first frame counts.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

DEFAULT_MAX_PIXELS = 1 << 26
"""67 million: a picture of 8192 by 8192."""
MAX_SIDE = 65_500
"""The longest side a JPEG can have."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""What is opened; of Pillow's other formats some start programs or are rarely tested against hostile files."""
WHITE = (255, 255, 255)

_MAX_SCANS = 100  # usual are 10; each costs a pass over the whole picture, for as little as ten bytes of the file
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)

# For the process, as a filter for a moment would not be safe among threads; our own bound is the stricter one.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

Picture = npt.NDArray[np.uint8]
"""(H, W, 3) uint8 RGB."""


class DecodeError(ValueError):
    """A picture cannot be used: `reason` is a short code, the message says more; both fit for a quarantine table.

    Codes: `not_a_picture` (no readable header of a known format), `too_large` (pixels, side or scans), `unsupported_pixels`
    (floating point and the like), `broken_picture` (truncated or corrupt).
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return self.detail


def decode_image(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS, target: int | None = None) -> Picture:
    """Decodes a picture to contiguous (H, W, 3) uint8 RGB, transparency on white; see `open_image` and `to_rgb`."""
    return np.asarray(to_rgb(open_image(data, max_pixels=max_pixels), target=target))


def open_image(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Reads a picture's header; no pixel is decoded yet. `size` is that of the stored, perhaps not upright, picture.

    Raises `DecodeError` for unknown formats, pictures of more than `max_pixels` pixels or with a side above `MAX_SIDE`,
    and JPEGs of so many progressive scans that they can only be meant to waste time.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise DecodeError("too_large", str(error)) from error
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        message = f"not a readable picture: no header of {known}; its {len(data)} bytes begin with {data[:16]!r}"
        raise DecodeError("not_a_picture", message) from error
    except Exception as error:
        raise _broken(error) from error
    width, height = image.size
    if width * height > max_pixels:
        raise DecodeError("too_large", f"{width}x{height} pixels: more than {max_pixels}")
    if max(width, height) > MAX_SIDE:
        raise DecodeError("too_large", f"{width}x{height} pixels: a side is longer than {MAX_SIDE}")
    if image.info.get("progressive") and data.count(b"\xff\xda") > _MAX_SCANS:
        raise DecodeError("too_large", f"a progressive JPEG of more than {_MAX_SCANS} scans")
    return image


def to_rgb(image: Image.Image, *, background: tuple[int, int, int] = WHITE, target: int | None = None) -> Image.Image:
    """Decodes an opened picture: mode RGB, upright by its EXIF tag (an unreadable one is ignored), 8 bits a channel.

    Args:
        background: colour behind transparent pixels.
        target: where the short side is only wanted at this many pixels, a JPEG is decoded at the smallest of
            1/1, 1/2, 1/4, 1/8 that is not below it, which is several times faster.

    Raises `DecodeError` for broken pictures and for pixels that have no agreed range.
    """
    try:
        if target is not None:
            image.draft(None, (target, target))
        image.load()
        orientation = _orientation(image)
        image = _eight_bit_rgb(image, background)
        return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
    except DecodeError:
        raise
    except Exception as error:  # on broken bytes the many decoders raise errors of any kind
        raise _broken(error) from error


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened picture as `to_rgb` turns it."""
    width, height = image.size
    return (height, width) if _orientation(image) in _SIDEWAYS else (width, height)


def _broken(error: Exception) -> DecodeError:
    return DecodeError("broken_picture", f"not a readable picture: {type(error).__name__}: {error}")


def _orientation(image: Image.Image) -> object:
    try:
        return image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # whatever is wrong with its metadata, the picture itself is decoded
        return None


def _eight_bit_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I;16"):  # by its high byte; Pillow's own conversion clips everything above 255 to white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "floating point" if image.mode == "F" else "32-bit"
        raise DecodeError("unsupported_pixels", f"{kind} pixels have no agreed range")
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.new("RGB", image.size, background)
        image.paste(rgba, mask=rgba)
    return image if image.mode == "RGB" else image.convert("RGB")
