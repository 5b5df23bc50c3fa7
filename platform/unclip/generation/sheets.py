"""What a manipulation leaves behind: every picture as PNG at every size, and a contact sheet of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import UnidentifiedImageError

from unclip.config.base import ConfigError
from unclip.data.decode import Picture
from unclip.generation.outputs import captioned_grid, read_png_metadata, write_png
from unclip.pipelines.cascade import CascadeOutput
from unclip.utils import storage

CELL = 256
"""Side of a picture on a sheet in pixels: a multiple of 64, so that every pixel of the smallest is as large as the others."""


@dataclass(frozen=True)
class Cell:
    """A place on a sheet: the picture by its size, uint8 (S, S, 3); `made` unless it was given."""

    images: Mapping[int, Picture]
    made: bool = True

    @property
    def largest(self) -> Picture:
        return self.images[max(self.images)]


@dataclass(frozen=True)
class Sheet:
    """Rows of pictures: what each row is, and a cell for every column."""

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]


@dataclass(frozen=True)
class SheetFolder:
    """Where a sheet and its pictures lie: `uri/SIZE/ROW-COLUMN.png` and, written last, `uri/sheet.png`.

    `about` is all that decides what is on them, plain JSON values, and in the metadata of each. Below the sheet stands the
    `attribution` of the training data, if any.
    """

    uri: str
    about: Mapping[str, Any]
    attribution: str = ""

    @property
    def sheet(self) -> str:
        """Address of the sheet."""
        return storage.join(self.uri, "sheet.png")

    def is_finished(self) -> bool:
        """Whether the sheet is there; `ConfigError` where the folder has pictures that something else was asked for."""
        earlier = self._earlier()
        if earlier is None:
            return False
        try:
            found = read_png_metadata(earlier)
        except UnidentifiedImageError:
            raise ConfigError(
                f"out = {self.uri!r}: {earlier!r} is no picture of this job; choose another out"
            ) from None
        differing = _differences(self._metadata, found)
        if differing:
            raise ConfigError(
                f"out = {self.uri!r}: its pictures were made otherwise ({', '.join(differing)}); choose another out"
            )
        return earlier == self.sheet

    def write(self, sheet: Sheet) -> str:
        """Writes the pictures with what they are, then the sheet; returns the sheet's address."""
        for row, (caption, cells) in enumerate(sheet.rows):
            for column, cell in enumerate(cells):
                about = {"row": caption, "column": sheet.columns[column], **self._metadata}
                for size, picture in cell.images.items() if cell.made else ():
                    write_png(picture, storage.join(self.uri, str(size), f"{row:03d}-{column:03d}.png"), about)
        rows = [(caption, [cell.largest for cell in cells]) for caption, cells in sheet.rows]
        footer = f"Training data: {self.attribution.replace('–', '-')}" if self.attribution else ""  # no – in the font
        page = captioned_grid(rows, sheet.columns, cell=CELL, footer=footer)
        write_png(np.asarray(page), self.sheet, self._metadata)
        return self.sheet

    def _earlier(self) -> str | None:
        """The sheet, or a picture of one that was never finished."""
        if storage.exists(self.sheet):
            return self.sheet
        sizes = (storage.join(self.uri, name) for name in storage.names(self.uri) if name.isdecimal())
        return next((storage.join(size, name) for size in sizes for name in storage.names(size)), None)

    @property
    def _metadata(self) -> dict[str, str]:
        return {
            key: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
            for key, value in self.about.items()
        }


def from_outside(picture: npt.NDArray[np.uint8]) -> Cell:
    """A picture that came from outside."""
    return Cell({len(picture): picture}, made=False)


def cells_of(output: CascadeOutput) -> list[Cell]:
    """A cell for each picture of the output."""
    count = len(next(iter(output.images.values())))
    return [Cell({size: pictures[row] for size, pictures in output.images.items()}) for row in range(count)]


def _differences(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """The keys of `expected` that `found` has otherwise or not at all; of JSON objects those inside."""
    differing = []
    for key, value in expected.items():
        ours, theirs = _parsed(value), _parsed(found.get(key, ""))
        if isinstance(ours, dict) and isinstance(theirs, dict):
            differing += sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))
        elif ours != theirs:
            differing.append(key)
    return differing


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
