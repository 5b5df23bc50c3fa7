"""What clients send: bodies, counted as they come, and pictures, known from their header before they are decoded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from unclip.data.decode import DecodeError, Picture, open_image, to_rgb
from unclip.data.transforms import resize_square
from unclip.serving.errors import ApiError, InvalidRequest, TimedOut, TooLarge
from unclip.serving.guards.paths import path_of

_CERTAIN = 250
"""From this value of 255 on a resized pixel is wholly kept; what lies between is drawn anew."""
_PATIENCE_S = 30.0
"""How much longer than at `_LEAST_RATE` a body may take to come."""
_LEAST_RATE = 2**15
"""Bytes a second."""


@dataclass(frozen=True)
class Upload:
    """A picture that a client has sent, upright.

    pixels: uint8 (H, W, 3), transparency on white. alpha: uint8 (H, W), 0 where it is transparent; None where the file knows
    no transparency.
    """

    pixels: Picture
    alpha: npt.NDArray[np.uint8] | None


def read_picture(content: bytes, *, field: str, max_pixels: int) -> Upload:
    """Decodes a PNG, JPEG or WebP file; it takes up to a second, so not in an event loop.

    Raises `InvalidRequest` naming `field` for every other format, broken files and animations, and `TooLarge` for more than
    `max_pixels` pixels, which the header tells.
    """
    try:
        if not _is_known(content):
            raise DecodeError("not_a_picture", "")
        image = open_image(content, max_pixels=max_pixels)
        if getattr(image, "is_animated", False) and image.format != "MPO":  # as cameras write, with a preview behind it
            raise InvalidRequest(f"{field}: an animation; send a single picture", code="invalid_image", param=field)
        return Upload(np.asarray(to_rgb(image)), _alpha(image))
    except DecodeError as error:
        refusal = TooLarge if error.reason == "too_large" else InvalidRequest
        detail = "not a PNG, JPEG or WebP file" if error.reason == "not_a_picture" else str(error)
        raise refusal(f"{field}: {detail}", code="invalid_image", param=field) from None


def square(picture: Picture, size: int) -> Picture:
    """uint8 (size, size, 3): the middle square, resized as pictures for training are."""
    return resize_square(picture, size)


def read_keep(mask: Upload, shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """(H, W) bool, True = this pixel stays: all but those that are fully transparent, which is OpenAI's rule.

    Args:
        mask: of a picture, or the picture itself.
        shape: (H, W) of the picture.

    Raises `InvalidRequest` where the mask has another shape, or no transparent pixel.
    """
    if mask.pixels.shape[:2] != shape:
        sizes = [f"{width}x{height}" for height, width in (mask.pixels.shape[:2], shape)]
        raise InvalidRequest(f"mask: has {sizes[0]} pixels, its picture {sizes[1]}", code="invalid_mask", param="mask")
    if mask.alpha is None or mask.alpha.all():
        message = "mask: no pixel of it is fully transparent, so nothing would be drawn anew"
        raise InvalidRequest(message, code="invalid_mask", param="mask")
    return mask.alpha > 0


def square_keep(keep: npt.NDArray[np.bool_], size: int) -> npt.NDArray[np.bool_]:
    """(size, size) bool for `square` of the picture that `keep` (H, W) belongs to; doubtful pixels do not stay."""
    white = np.where(keep[..., None], np.uint8(255), np.uint8(0)).repeat(3, axis=2)
    return square(white, size)[..., 0] >= _CERTAIN


def _is_known(content: bytes) -> bool:
    """By its first bytes, so that the parsers of no other format see it."""
    is_webp = content[:4] == b"RIFF" and content[8:12] == b"WEBP"
    return is_webp or content.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"))


def _alpha(image: Image.Image) -> npt.NDArray[np.uint8] | None:
    """Of a decoded picture; 16-bit grey ones with a transparent value count as opaque."""
    if image.mode.startswith("I") or not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")  # still knows which way up it belongs
    return np.ascontiguousarray(np.asarray(to_rgb(alpha))[..., 0])


class BodyLimit:
    """ASGI middleware that refuses requests whose body is too large: at once where they say so, else when it has come.

    Bodies that trickle are given up, so that nobody keeps places taken by saying nothing. Nothing is held: bytes are counted
    on their way to the app.

    Args:
        app: what answers the requests.
        limit: bytes of a body.
        others: bytes by path, for those where it is another number.
    """

    def __init__(self, app: Any, *, limit: int, others: Mapping[str, int] | None = None) -> None:
        self._app, self._limit, self._others = app, limit, dict(others or {})

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._others.get(path_of(scope), self._limit)
        if _announced(scope) > limit:
            await _refuse(_too_large(limit), send)
            return
        await _Counted(self._app, limit, receive, send).run(scope)


class _Counted:
    """One request whose body is counted. Once it is refused, no answer but ours goes out."""

    def __init__(self, app: Any, limit: int, receive: Any, send: Any) -> None:
        self._app, self._limit, self._receive, self._send = app, limit, receive, send
        self._count, self._is_complete, self._has_begun = 0, False, False
        self._refusal: ApiError | None = None
        self._began = asyncio.get_running_loop().time()

    async def run(self, scope: Mapping[str, Any]) -> None:
        try:
            await self._app(scope, self._counted, self._unless_refused)
        except ApiError as error:
            if error is not self._refusal:
                raise
        if self._refusal is not None and not self._has_begun:
            await _refuse(self._refusal, self._send)

    async def _counted(self) -> Mapping[str, Any]:
        try:
            async with asyncio.timeout_at(None if self._is_complete else self._latest):
                message: Mapping[str, Any] = await self._receive()
        except TimeoutError:
            self._refusal = TimedOut("the request's body did not come in time")
            raise self._refusal from None
        self._count += len(message.get("body", b""))
        self._is_complete = not message.get("more_body", False)
        if self._count > self._limit:
            self._refusal = _too_large(self._limit)
            raise self._refusal
        return message

    @property
    def _latest(self) -> float:
        """When the next part has to be there."""
        return self._began + _PATIENCE_S + self._count / _LEAST_RATE

    async def _unless_refused(self, message: Mapping[str, Any]) -> None:
        """Frameworks make answers of their own of an error while they read; an answer that has begun goes on."""
        if self._refusal is not None and not self._has_begun:
            return
        self._has_begun = True
        await self._send(message)


def _announced(scope: Mapping[str, Any]) -> int:
    """Bytes by the header, 0 where there is none that is a number: the server in front has read it before."""
    text = dict(scope["headers"]).get(b"content-length", b"")
    return int(text) if text.isdigit() else 0


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the request's body is larger than {limit} bytes", code="request_too_large")


async def _refuse(error: ApiError, send: Any) -> None:
    body = json.dumps(error.body).encode()
    length = str(len(body)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", length), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
