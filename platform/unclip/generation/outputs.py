"""What generation leaves behind: PNG files that say how they were made, and a captioned grid to look at."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from unclip.utils import storage

Picture = npt.NDArray[np.uint8]
GridRow = tuple[str, Sequence[Picture | None]]
_Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

_PAGE, _INK, _SOFT, _LINE, _EMPTY = "#ffffff", "#1d1d24", "#7a7a86", "#e2e2e8", "#f6f6f8"
_MARGIN, _GAP = 40, 16


def encode_png(image: Picture, metadata: Mapping[str, str]) -> bytes:
    """uint8 RGB `image` (H, W, 3) as PNG with `metadata` as its text chunks."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be uint8 (H, W, 3), not {image.dtype} {image.shape}")
    chunks = PngInfo()
    for key, text in metadata.items():
        chunks.add_itxt(key, text)
    return _encoded(Image.fromarray(image), chunks)


def write_png(image: Picture, uri: str, metadata: Mapping[str, str]) -> None:
    """Writes what `encode_png` makes, all of it or nothing."""
    storage.write_bytes(uri, encode_png(image, metadata))


def read_png(uri: str) -> Picture:
    """The pixels of a PNG file, uint8 RGB (H, W, 3)."""
    return decode_png(storage.read_bytes(uri))


def decode_png(content: bytes) -> Picture:
    """The pixels of an encoded PNG, uint8 RGB (H, W, 3)."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def read_png_metadata(uri: str) -> dict[str, str]:
    """The text chunks that precede a PNG's pixels; only the head of the file is read."""
    fs, path = storage.filesystem(uri)
    with fs.open(path, "rb") as file, Image.open(file) as image:
        return {str(key): value for key, value in image.info.items() if isinstance(value, str)}


def write_grid(grid: Image.Image, uri: str) -> None:
    """Writes a grid as PNG, all of it or nothing."""
    storage.write_bytes(uri, _encoded(grid, PngInfo()))


def captioned_grid(
    rows: Sequence[GridRow], column_titles: Sequence[str], *, cell: int = 256, footer: str = ""
) -> Image.Image:
    """A page with one row a prompt: the caption at the left, then its pictures under the column titles.

    Args:
        rows: (caption, pictures uint8 (H, W, 3) of any size, or None for an empty place), one picture a column.
        column_titles: what stands above each column.
        cell: side of a picture on the page in pixels. Smaller pictures are enlarged without smoothing, so that their
            pixels are seen as they are; larger ones are averaged down.
        footer: a small line below everything, as for an attribution.
    """
    for caption, pictures in rows:
        if len(pictures) != len(column_titles):
            raise ValueError(f"row {caption!r} has {len(pictures)} pictures for {len(column_titles)} columns")
    caption_width, title_height = max(160, cell), max(32, cell // 8)
    footer_height = _MARGIN if footer else 0
    step = cell + _GAP
    width = 2 * _MARGIN + caption_width + len(column_titles) * step
    height = 2 * _MARGIN + title_height + max(0, len(rows) * step - _GAP) + footer_height
    page = Image.new("RGB", (width, height), _PAGE)
    draw = ImageDraw.Draw(page)
    size = max(14, cell // 13)
    left = _MARGIN + caption_width + _GAP
    for column, title in enumerate(column_titles):
        centre = left + column * step + cell / 2
        draw.text((centre, _MARGIN + title_height / 2), title, _SOFT, ImageFont.load_default(size), anchor="mm")
    for index, (caption, pictures) in enumerate(rows):
        top = _MARGIN + title_height + index * step
        _draw_caption(draw, caption, box=(_MARGIN, top, caption_width, cell), size=size)
        for column, picture in enumerate(pictures):
            _draw_cell(page, picture, left=left + column * step, top=top, cell=cell)
    if footer:
        draw.text((_MARGIN, height - _MARGIN), footer, _SOFT, ImageFont.load_default(max(12, size - 6)), anchor="ls")
    return page


def _encoded(image: Image.Image, chunks: PngInfo) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def _draw_caption(draw: ImageDraw.ImageDraw, caption: str, *, box: tuple[int, int, int, int], size: int) -> None:
    """Writes `caption` into box (left, top, width, height): wrapped at words, centred vertically, cut off with dots."""
    left, top, width, height = box
    font = ImageFont.load_default(size)
    line_height = round(size * 1.35)
    lines = _wrap(draw, caption, font, width)
    room = max(1, height // line_height)
    if len(lines) > room:
        lines = [*lines[: room - 1], lines[room - 1] + " ..."]
    start = top + (height - len(lines) * line_height) / 2
    for index, line in enumerate(lines):
        draw.text((left, start + (index + 0.5) * line_height), line, _INK, font, anchor="lm")


def _wrap(draw: ImageDraw.ImageDraw, text: str, font: _Font, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken between words, and inside a word that is wider than a line."""
    lines: list[str] = []
    for word in text.split():
        extended = f"{lines[-1]} {word}" if lines else word
        if lines and draw.textlength(extended, font) <= width:
            lines[-1] = extended
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and draw.textlength(lines[-1] + letter, font) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def _draw_cell(page: Image.Image, picture: Picture | None, *, left: int, top: int, cell: int) -> None:
    draw = ImageDraw.Draw(page)
    frame = (left - 1, top - 1, left + cell, top + cell)
    if picture is None:
        draw.rectangle(frame, fill=_EMPTY, outline=_LINE)
        return
    height, width = picture.shape[:2]
    scale = cell / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    draw.rectangle(frame, fill=_PAGE, outline=_LINE)
    page.paste(
        Image.fromarray(picture).resize(size, method), (left + (cell - size[0]) // 2, top + (cell - size[1]) // 2)
    )
