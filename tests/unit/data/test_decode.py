"""Decoding: every mode ends as upright RGB, nothing too large is decoded, broken bytes give a reason."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unclip.data.decode import DecodeError, decode_image


def encode(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def test_rgb_png_is_exact(picture: np.ndarray) -> None:
    decoded = decode_image(encode(Image.fromarray(picture)))
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, picture)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(picture: np.ndarray, orientation: int) -> None:
    upright = {
        1: picture, 2: picture[:, ::-1], 3: picture[::-1, ::-1], 4: picture[::-1], 5: picture.swapaxes(0, 1),
        6: np.rot90(picture, -1), 7: np.rot90(picture, 2).swapaxes(0, 1), 8: np.rot90(picture, 1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(picture), exif=exif)), upright)


def test_transparency_becomes_white() -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (255, 0, 0, 255)
    pixels[0, 1] = (255, 0, 0, 0)
    pixels[1, 0] = (0, 0, 0, 128)
    decoded = decode_image(encode(Image.fromarray(pixels)))
    assert decoded[0, 0].tolist() == [255, 0, 0]
    assert decoded[0, 1].tolist() == [255, 255, 255]
    assert decoded[1, 0].tolist() == pytest.approx([127] * 3, abs=1)


def test_palette_with_a_transparent_colour() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    decoded = decode_image(encode(image, transparency=0))
    assert decoded[0].tolist() == [[255, 255, 255], [200, 100, 50]]


def test_sixteen_bit_grey_keeps_its_range() -> None:
    image = Image.fromarray(np.array([[0, 256, 32768, 65535]], dtype=np.uint16))
    assert decode_image(encode(image))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_cmyk_and_grey_jpeg() -> None:
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert decode_image(encode(cmyk, "JPEG", quality=95))[8, 8].tolist() == pytest.approx([255, 0, 0], abs=6)
    grey = Image.new("L", (16, 16), 77)
    assert decode_image(encode(grey, "JPEG"))[8, 8].tolist() == [77, 77, 77]


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    decoded = decode_image(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert decoded[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(("target", "side"), [(None, 1024), (1024, 1024), (512, 512), (300, 512), (64, 128)])
def test_jpeg_is_decoded_no_smaller_than_the_target(target: int | None, side: int) -> None:
    ramp = np.linspace(0, 255, 1024).astype(np.uint8)
    image = Image.fromarray(np.repeat(np.tile(ramp, (1024, 1))[:, :, None], 3, axis=2))
    decoded = decode_image(encode(image, "JPEG", quality=95), target=target)
    assert decoded.shape == (side, side, 3)
    expected = np.asarray(image.resize((side, side), Image.Resampling.BOX)).astype(int)
    assert np.abs(decoded.astype(int) - expected).max() <= 6


def test_too_many_pixels_are_refused_by_the_header_alone() -> None:
    data = encode(Image.new("RGB", (64, 64)))
    with pytest.raises(DecodeError, match=r"64x64 pixels: more than 4000"):
        decode_image(data[:60], max_pixels=4000)  # there is no pixel data to decode


def test_decompression_bomb_is_refused() -> None:
    data = encode(Image.new("L", (1, 1)))
    header = b"IHDR" + struct.pack(">II", 60000, 60000) + data[24:29]
    bomb = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    with pytest.raises(DecodeError, match="3600000000 pixels"):
        decode_image(bomb)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_truncated_and_foreign_bytes_give_a_reason(picture: np.ndarray, form: str) -> None:
    data = encode(Image.fromarray(picture), form)
    for cut in (0, 1, 10, len(data) // 2):
        with pytest.raises(DecodeError, match="not a readable picture"):
            decode_image(data[:cut])
    with pytest.raises(DecodeError):
        decode_image(b"hello, this is text")
