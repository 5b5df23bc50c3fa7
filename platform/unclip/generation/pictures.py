"""Pictures and masks that a job is given: of any format and size, bounded before anything is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from unclip.config.base import ConfigError
from unclip.data.decode import DecodeError, Picture, decode_image
from unclip.data.transforms import resize_square
from unclip.utils import storage

MAX_BYTES = 64 * 2**20
"""Of an encoded picture; one of 67 million pixels as a JPEG has less."""
_CERTAIN = 250
"""From this value of 255 on a mask means it; what lies between, as on soft edges, is drawn anew."""


@dataclass(frozen=True)
class Originals:
    """What a manipulation begins with: N pictures uint8 (N, S, S, 3), and what a sheet calls each."""

    pictures: npt.NDArray[np.uint8]
    names: Sequence[str]


def read_originals(field: str, uris: Sequence[str], size: int) -> Originals:
    """The middle squares of pictures, at least one, resized; a file's name is its picture's."""
    pictures = np.stack([read_square(field, uri, size) for uri in uris])
    return Originals(pictures, [uri.rstrip("/").rsplit("/", 1)[-1] for uri in uris])


def read_picture(field: str, uri: str) -> Picture:
    """uint8 RGB (H, W, 3), upright; `ConfigError` naming `field` where there is none or it is too large."""
    try:
        size = storage.size(uri)
        if size is None:
            raise ConfigError(f"{field} = {uri!r}: does not exist")
        if size > MAX_BYTES:
            raise ConfigError(f"{field} = {uri!r}: has {size} bytes; at most {MAX_BYTES} are read")
        return decode_image(storage.read_bytes(uri))
    except DecodeError as error:
        raise ConfigError(f"{field} = {uri!r}: {error}") from None
    except OSError as error:
        raise ConfigError(f"{field} = {uri!r}: cannot be read: {error.strerror or error}") from None


def read_square(field: str, uri: str, size: int) -> Picture:
    """The middle square of a picture, resized: uint8 RGB (size, size, 3)."""
    return resize_square(read_picture(field, uri), size)


def read_keep(repaint: str | None, keep: str | None, *, picture: Picture, size: int) -> npt.NDArray[np.bool_]:
    """(size, size) bool, True = this pixel stays, from one of the two masks; doubtful pixels do not stay.

    Args:
        repaint: address of a picture of the same shape as `picture`, white where it is to be drawn anew, black elsewhere.
        keep: the same, white where it is to stay.
    """
    if (repaint is None) == (keep is None):
        raise ConfigError(f"repaint = {repaint!r}, keep = {keep!r}: give one of the two masks")
    field, uri = ("repaint", repaint) if repaint is not None else ("keep", keep)
    assert uri is not None
    mask = read_picture(field, uri)
    if mask.shape != picture.shape:
        shapes = [f"{shape[1]}x{shape[0]}" for shape in (mask.shape, picture.shape)]
        raise ConfigError(f"{field} = {uri!r}: has {shapes[0]} pixels, its picture {shapes[1]}")
    certain = np.asarray(Image.fromarray(resize_square(mask, size)).convert("L"))
    return certain >= _CERTAIN if repaint is None else certain <= 255 - _CERTAIN
