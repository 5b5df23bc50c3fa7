"""Small copies of pictures for pages."""

from __future__ import annotations

import io

from PIL import Image

from unclip.data.decode import decode_image

SIDE = 128


def thumbnail(image: bytes) -> bytes:
    """An encoded picture as a JPEG whose longer side has at most 128 pixels."""
    picture, sink = Image.fromarray(decode_image(image, target=SIDE)), io.BytesIO()
    picture.thumbnail((SIDE, SIDE))
    picture.save(sink, "JPEG", quality=85)
    return sink.getvalue()
