"""Files for clients, read back by Pillow: pixels, and what they say of themselves."""

from __future__ import annotations

import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from unclip.serving.pictures.encoding import MEDIA_TYPES, Encoder, Form
from unclip.serving.pictures.provenance import Label

LABEL = Label(model="hearts", revision="ab" * 32, seed=2**62, created=1_790_000_000)
SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/"
IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
XMP = "{http://ns.adobe.com/xap/1.0/}"
OURS = "{urn:unclip:picture:1.0}"
_SLOPE = np.linspace(0, 255, 64)
PICTURE = np.stack(np.broadcast_arrays(_SLOPE[:, None], _SLOPE, _SLOPE[::-1]), axis=-1).astype(np.uint8)


def encode(form: Form, compression: int | None = None, label: Label = LABEL) -> bytes:
    return Encoder(None).encode(PICTURE, form=form, compression=compression, label=label)


def opened(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def xmp_fields(image: Image.Image) -> dict[str, str]:
    root = ElementTree.fromstring(image.info["xmp"])
    (description,) = root.iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    return dict(description.attrib)


@pytest.mark.parametrize("form", MEDIA_TYPES)
def test_files_are_of_the_form_that_was_asked_for(form: Form) -> None:
    image = opened(encode(form))
    assert image.get_format_mimetype() == MEDIA_TYPES[form]
    assert (image.mode, image.size) == ("RGB", (64, 64))
    assert np.abs(np.asarray(image).astype(int) - PICTURE).mean() < 2


def test_png_keeps_every_pixel_whatever_the_compression() -> None:
    for compression in (None, 0, 100):
        np.testing.assert_array_equal(np.asarray(opened(encode("png", compression))), PICTURE)


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_compression_is_quality(form: Form) -> None:
    contents = [encode(form, compression) for compression in (0, 30, 80, 100)]
    sizes = [len(content) for content in contents]
    assert sizes == sorted(set(sizes))
    errors = [np.abs(np.asarray(opened(content)).astype(int) - PICTURE).mean() for content in contents]
    assert errors[0] > errors[-1]
    assert encode(form) == contents[-1]


@pytest.mark.parametrize("form", MEDIA_TYPES)
def test_every_picture_says_where_it_comes_from(form: Form) -> None:
    fields = xmp_fields(opened(encode(form)))
    assert fields[f"{IPTC}DigitalSourceType"] == f"{SOURCE}trainedAlgorithmicMedia"
    assert fields[f"{XMP}CreatorTool"].startswith("unclip/")
    assert fields[f"{XMP}CreateDate"] == "2026-09-21T14:13:20Z"
    assert fields[f"{OURS}Model"] == "hearts"
    assert fields[f"{OURS}Revision"] == "ab" * 32
    assert fields[f"{OURS}Seed"] == str(2**62)


def test_edits_are_composites() -> None:
    edit = Label(model="hearts", revision="r", seed=0, created=0, is_composite=True)
    expected = f"{SOURCE}compositeWithTrainedAlgorithmicMedia"
    assert xmp_fields(opened(encode("jpeg", label=edit)))[f"{IPTC}DigitalSourceType"] == expected
    assert opened(encode("png", label=edit)).info["DigitalSourceType"] == expected


def test_png_says_it_in_text_chunks() -> None:
    info = opened(encode("png")).info
    assert info["Software"].startswith("unclip/")
    assert info["Creation Time"] == "2026-09-21T14:13:20Z"
    assert info["DigitalSourceType"] == f"{SOURCE}trainedAlgorithmicMedia"
    assert (info["Model"], info["Revision"], info["Seed"]) == ("hearts", "ab" * 32, str(2**62))
    assert "Copyright" not in info


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_exif_names_the_software(form: Form) -> None:
    assert opened(encode(form)).getexif()[0x0131].startswith("unclip/")


@pytest.mark.parametrize("form", MEDIA_TYPES)
def test_attributions_are_carried_whatever_is_in_them(form: Form) -> None:
    said = 'OpenMoji – "hearts" & <stars>, CC BY-SA 4.0'
    label = Label(model="m", revision="r", seed=0, created=0, attribution=said)
    image = opened(encode(form, label=label))
    credit = xmp_fields(image)["{http://ns.adobe.com/photoshop/1.0/}Credit"]
    assert credit == f"Training data: {said}"
    if form == "png":
        assert image.info["Copyright"] == credit


@pytest.mark.parametrize("form", MEDIA_TYPES)
def test_the_same_picture_is_the_same_file(form: Form) -> None:
    assert encode(form, 80) == encode(form, 80)
