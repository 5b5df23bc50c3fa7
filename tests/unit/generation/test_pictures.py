from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unclip.config.base import ConfigError
from unclip.generation import pictures
from unclip.generation.pictures import read_keep, read_picture, read_square


def save(path: Path, pixels: np.ndarray, **settings: object) -> str:
    Image.fromarray(pixels).save(path, **settings)
    return str(path)


def halves(white: np.ndarray) -> np.ndarray:
    return np.repeat(white[..., None], 3, axis=2).astype(np.uint8) * 255


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff"])
def test_pictures_of_many_formats_are_read_as_they_are(tmp_path: Path, name: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    uri = save(tmp_path / name, pixels)
    np.testing.assert_array_equal(read_picture("picture", uri), pixels)
    np.testing.assert_array_equal(read_square("picture", uri, 12), pixels[:, 4:16])


def test_what_is_no_picture_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"picture = '.*none.png': does not exist"):
        read_picture("picture", str(tmp_path / "none.png"))
    (tmp_path / "text.png").write_text("no picture at all")
    with pytest.raises(ConfigError, match=r"picture = '.*text.png': not a readable picture"):
        read_picture("picture", str(tmp_path / "text.png"))
    monkeypatch.setattr(pictures, "MAX_BYTES", 10)
    with pytest.raises(ConfigError, match="has 17 bytes; at most 10 are read"):
        read_picture("picture", str(tmp_path / "text.png"))


def test_repaint_and_keep_are_each_others_opposite(tmp_path: Path) -> None:
    white = np.zeros((32, 32), dtype=bool)
    white[8:24, :16] = True
    uri, picture = save(tmp_path / "mask.png", halves(white)), np.zeros((32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(read_keep(None, uri, picture=picture, size=32), white)
    np.testing.assert_array_equal(read_keep(uri, None, picture=picture, size=32), ~white)


def test_doubtful_pixels_do_not_stay(tmp_path: Path) -> None:
    """Where a mask is grey, or becomes so when it is resized, the pixel is drawn anew, whichever of the two it is."""
    grey = np.full((32, 32, 3), 128, dtype=np.uint8)
    uri, picture = save(tmp_path / "grey.png", grey), np.zeros((32, 32, 3), dtype=np.uint8)
    assert not read_keep(None, uri, picture=picture, size=16).any()
    assert not read_keep(uri, None, picture=picture, size=16).any()
    white = np.zeros((32, 32), dtype=bool)
    white[:, :15] = True
    uri = save(tmp_path / "edge.png", halves(white))
    kept = [read_keep(*masks, picture=picture, size=16) for masks in ((None, uri), (uri, None))]
    assert not (kept[0] & kept[1]).any()
    assert kept[0][:, :5].all()
    assert kept[1][:, 10:].all()
    assert not kept[0][:, 7].any()


def test_masks_of_other_shapes_and_numbers_are_refused(tmp_path: Path) -> None:
    uri, picture = save(tmp_path / "mask.png", halves(np.ones((8, 16), dtype=bool))), np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ConfigError, match=r"keep = .*: has 16x8 pixels, its picture 8x8"):
        read_keep(None, uri, picture=picture, size=8)
    for masks in ((None, None), (uri, uri)):
        with pytest.raises(ConfigError, match=r"repaint = .*, keep = .*: give one of the two masks"):
            read_keep(*masks, picture=picture, size=8)
