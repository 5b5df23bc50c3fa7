"""What is stored of a picture, and what is known of it afterwards."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unclip.data.decode import decode_image
from unclip.data.ingest.pictures import Examined, PicturePolicy, examine, thumbnail
from unclip.data.ingest.reasons import Refusal


def encode(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def look(data: bytes | None, **policy: Any) -> Examined:
    found = examine(data, PicturePolicy.from_dict(policy))
    assert isinstance(found, Examined), found
    return found


def reason(data: bytes | None, **policy: Any) -> str:
    found = examine(data, PicturePolicy.from_dict(policy))
    assert isinstance(found, Refusal)
    assert found.detail
    return found.reason


@pytest.fixture
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((90, 60), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_bytes_stay_as_they_came(image: Image.Image, form: str) -> None:
    found = look(encode(image, form))
    assert found.stored is None
    assert (found.width, found.height, found.format) == (90, 60, form.lower())


def test_a_turned_picture_counts_upright_and_has_the_hash_of_its_upright_twin(image: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = look(encode(image, exif=exif))
    upright = look(encode(image.transpose(Image.Transpose.ROTATE_270)))
    assert (turned.width, turned.height) == (60, 90)
    assert turned.content_hash == upright.content_hash != look(encode(image)).content_hash


def test_several_pictures_in_one_jpeg_are_a_jpeg(image: Image.Image) -> None:
    found = look(encode(image, "MPO", save_all=True, append_images=[image.rotate(180)]))
    assert found.format == "jpeg"
    assert found.content_hash == look(encode(image, "JPEG")).content_hash


def test_transparency_on_white_is_left_to_training(image: Image.Image) -> None:
    image.putalpha(128)
    data = encode(image)
    found = look(data)
    assert found.stored is None
    white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert found.content_hash == look(encode(white)).content_hash


def test_transparency_on_another_colour_is_flattened(image: Image.Image) -> None:
    opaque = encode(image)
    image.putalpha(0)
    found = look(encode(image), background=[10, 20, 30])
    assert found.format == "png"
    assert found.stored is not None
    assert (decode_image(found.stored) == np.array([10, 20, 30])).all()
    assert look(opaque, background=[10, 20, 30]).stored is None


@pytest.mark.parametrize("form", ["jpeg", "png", "webp"])
def test_reencoding_scales_and_keeps_the_hash_of_the_original(image: Image.Image, form: str) -> None:
    found = look(encode(image), reencode={"format": form, "max_side": 45})
    assert (found.width, found.height, found.format) == (45, 30, form)
    assert found.stored is not None
    stored = Image.open(io.BytesIO(found.stored))
    assert (stored.format, stored.size) == (form.upper(), (45, 30))
    expected = np.asarray(image.resize((45, 30), Image.Resampling.BOX)).astype(int)
    assert np.abs(decode_image(found.stored) - expected).mean() < 4
    assert found.content_hash == look(encode(image)).content_hash


def test_reencoding_does_not_enlarge_and_png_is_exact(image: Image.Image) -> None:
    found = look(encode(image), reencode={"format": "png", "max_side": 500})
    assert found.stored is not None
    np.testing.assert_array_equal(decode_image(found.stored), np.asarray(image))


def test_a_long_picture_keeps_a_pixel() -> None:
    found = look(encode(Image.new("L", (5000, 2))), reencode={"max_side": 100})
    assert (found.width, found.height) == (100, 1)


def test_shapes_that_are_refused(image: Image.Image) -> None:
    data = encode(image)
    assert reason(data, min_side=61) == "too_small"
    assert look(data, min_side=60).height == 60
    assert reason(data, max_aspect=1.49) == "too_elongated"
    assert look(data, max_aspect=1.5).height == 60
    assert reason(encode(image.rotate(90, expand=True)), max_aspect=1.49) == "too_elongated"
    assert reason(data, max_pixels=5399) == "too_large"
    assert reason(None) == reason(b"") == "no_image"


def test_thumbnails_are_small_upright_jpegs() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    small = thumbnail(encode(Image.new("RGB", (400, 200), "red"), exif=exif), 1 << 20)
    assert small is not None
    picture = Image.open(io.BytesIO(small))
    assert (picture.format, picture.size) == ("JPEG", (48, 96))
    assert thumbnail(b"no picture", 1 << 20) is None
    assert thumbnail(None, 1 << 20) is None
    assert thumbnail(encode(Image.new("RGB", (400, 200))), 79_999) is None
