from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unclip.generation.outputs import captioned_grid, read_png, read_png_metadata, write_png


def flat(size: int, color: tuple[int, int, int]) -> np.ndarray:
    return np.full((size, size, 3), color, dtype=np.uint8)


def test_png_keeps_pixels_and_says_where_they_come_from(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    uri, metadata = str(tmp_path / "a" / "b.png"), {"prompt": "ein Fuchs, 赤い狐", "seed": "7"}
    write_png(picture, uri, metadata)
    np.testing.assert_array_equal(read_png(uri), picture)
    assert read_png_metadata(uri) == metadata
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.png"]


def test_png_wants_8_bit_rgb(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"uint8 \(H, W, 3\), not float64 \(4, 4, 3\)"):
        write_png(np.zeros((4, 4, 3)), str(tmp_path / "a.png"), {})  # type: ignore[arg-type]


def cells(page: Image.Image, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) of all pixels of exactly this colour."""
    rows, columns = np.nonzero((np.asarray(page) == color).all(axis=2))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def test_every_picture_fills_a_cell_in_its_row_and_column() -> None:
    colors = [[(200, 0, 0), (0, 200, 0)], [(0, 0, 200), (200, 200, 0)]]
    rows = [
        ("one", [flat(64, colors[0][0]), flat(1024, colors[0][1])]),
        ("two", [flat(64, colors[1][0]), flat(256, colors[1][1])]),
    ]
    page = captioned_grid(rows, ["64", "1024"], cell=128)
    boxes = [[cells(page, color) for color in row] for row in colors]
    for row in boxes:
        for left, top, right, bottom in row:
            assert (right - left, bottom - top) == (128, 128)
    assert boxes[0][0][0] == boxes[1][0][0] < boxes[0][1][0] == boxes[1][1][0]
    assert boxes[0][0][1] == boxes[0][1][1] < boxes[1][0][1] == boxes[1][1][1]
    assert boxes[1][1][2] <= page.width
    assert boxes[1][1][3] <= page.height


def test_small_pictures_are_enlarged_pixel_by_pixel() -> None:
    picture = flat(64, (10, 20, 30))
    picture[0, 0] = (200, 100, 50)
    page = captioned_grid([("x", [picture])], ["64"], cell=256)
    left, top, right, bottom = cells(page, (200, 100, 50))
    assert (right - left, bottom - top) == (4, 4)


def test_captions_stay_beside_the_pictures() -> None:
    caption = "a very long caption with a wordwithoutanyspaceswhichdoesnotfitintooneline " * 20
    long = np.asarray(captioned_grid([(caption, [None])], ["64"], cell=128))
    short = np.asarray(captioned_grid([("", [None])], ["64"], cell=128))
    assert long.shape == short.shape
    changed_rows, changed_columns = np.nonzero((long != short).any(axis=2))
    rows, columns = np.nonzero((short == (0xF6, 0xF6, 0xF8)).all(axis=2))  # the empty cell
    assert changed_columns.max() < columns.min()
    assert changed_rows.min() >= rows.min() - 2
    assert changed_rows.max() <= rows.max() + 2


def test_the_footer_is_written_below_everything() -> None:
    rows = [("x", [flat(64, (200, 0, 0))])]
    page = captioned_grid(rows, ["64"], footer="Real drawings: OpenMoji, CC BY-SA 4.0")
    bottom = cells(page, (200, 0, 0))[3]
    below = np.asarray(page.crop((0, bottom + 2, page.width, page.height)))
    assert (below < 200).any()
    assert captioned_grid(rows, ["64"]).height < page.height


def test_every_row_needs_a_picture_for_each_column() -> None:
    with pytest.raises(ValueError, match="row 'x' has 1 pictures for 2 columns"):
        captioned_grid([("x", [None])], ["64", "256"])
