"""One look at an encoded picture: is it kept, how large is it, what are its hashes, what bytes are stored."""

from __future__ import annotations

import io
from typing import Annotated, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import Field

from unclip.config.base import Config
from unclip.data.decode import DEFAULT_MAX_PIXELS, MAX_SIDE, WHITE, DecodeError, open_image, to_rgb
from unclip.data.ingest.hashes import content_hash, grey_thumbnail
from unclip.data.ingest.reasons import Refusal

THUMBNAIL_SIDE = 96

_FORMAT_NAMES = {"MPO": "jpeg"}  # a JPEG with further pictures behind the first

Channel = Annotated[int, Field(ge=0, le=255)]


class Reencoding(Config):
    """How pictures are written anew."""

    format: Literal["jpeg", "png", "webp"] = "jpeg"
    """Container of the stored pictures."""
    quality: int = Field(default=95, ge=1, le=100)
    """Of JPEG and WebP; PNG is lossless."""
    max_side: int | None = Field(default=None, ge=1, le=MAX_SIDE)
    """Longer pictures are scaled down so that the longer side has this many pixels; null keeps every size."""


class PicturePolicy(Config):
    """Which pictures are kept, and how they are stored."""

    min_side: int = Field(default=1, ge=1)
    """Pixels that the shorter side has at least."""
    max_aspect: float | None = Field(default=None, ge=1.0)
    """Longer side over shorter side, at most; null for any."""
    max_pixels: int = Field(default=DEFAULT_MAX_PIXELS, ge=1, le=DEFAULT_MAX_PIXELS)
    """Larger pictures are refused by their header, before a pixel is decoded. Judging one takes 4 to 8 bytes of memory
    a pixel."""
    background: tuple[Channel, Channel, Channel] = WHITE
    """RGB colour behind transparent pixels. Training puts white there: with another colour, pictures with transparency
    are stored flattened, as PNG unless `reencode` says otherwise."""
    reencode: Reencoding | None = None
    """Write every picture anew; null stores the bytes as they came."""


class Examined(NamedTuple):
    """What is known of a picture that is kept.

    Args:
        stored: its new bytes; None where they stay as they came.
        width: upright, of the stored bytes, in pixels; so is `height`.
        format: of the stored bytes, in lower case.
        content_hash: SHA-256 of the upright RGB pixels as they came, before any scaling or re-encoding.
        grey: (32, 32) uint8, what the perceptual hash is made of.
    """

    stored: bytes | None
    width: int
    height: int
    format: str
    content_hash: bytes
    grey: npt.NDArray[np.uint8]


def examine(data: bytes | None, policy: PicturePolicy) -> Examined | Refusal:
    """Decodes the picture once, after its header was found good. Pure, and safe among threads."""
    if not data:
        return Refusal("no_image", "there is no image" if data is None else "the image has zero bytes")
    try:
        image = open_image(data, max_pixels=policy.max_pixels)
        refusal = _shape_refusal(*image.size, policy)
        if refusal is not None:
            return refusal
        name = str(image.format)
        is_flattened = policy.background != WHITE and image.has_transparency_data
        upright = to_rgb(image, background=policy.background)
    except DecodeError as error:
        return Refusal(error.reason, error.detail)
    pixels_hash, grey = content_hash(upright), grey_thumbnail(upright)
    reencoding = policy.reencode or (Reencoding(format="png") if is_flattened else None)
    if reencoding is None:
        return Examined(None, *upright.size, _FORMAT_NAMES.get(name, name.lower()), pixels_hash, grey)
    upright = _scaled(upright, reencoding.max_side)
    return Examined(_encode(upright, reencoding), *upright.size, reencoding.format, pixels_hash, grey)


def thumbnail(data: bytes | None, max_pixels: int) -> bytes | None:
    """A JPEG of at most 96 by 96 pixels; None where the picture cannot be decoded."""
    if not data:
        return None
    try:
        small = to_rgb(open_image(data, max_pixels=max_pixels), target=THUMBNAIL_SIDE)
    except DecodeError:
        return None
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return _encode(small, Reencoding(quality=80))


def _shape_refusal(width: int, height: int, policy: PicturePolicy) -> Refusal | None:
    short, long = sorted((width, height))
    if short < policy.min_side:
        return Refusal("too_small", f"{width}x{height} pixels: a side is shorter than {policy.min_side}")
    if policy.max_aspect is not None and long > policy.max_aspect * short:
        return Refusal("too_elongated", f"{width}x{height} pixels: more than {policy.max_aspect:g} to 1")
    return None


def _scaled(image: Image.Image, max_side: int | None) -> Image.Image:
    if max_side is None or max(image.size) <= max_side:
        return image
    scale = max_side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


def _encode(image: Image.Image, reencoding: Reencoding) -> bytes:
    options = {} if reencoding.format == "png" else {"quality": reencoding.quality}
    buffer = io.BytesIO()
    image.save(buffer, reencoding.format, **options)
    return buffer.getvalue()
