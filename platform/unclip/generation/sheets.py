"""What a manipulation leaves behind: every picture as PNG at every size, and a contact sheet of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from unclip.data.decode import Picture
from unclip.generation.outputs import captioned_grid, write_grid, write_png
from unclip.pipelines.cascade import CascadeOutput
from unclip.utils import storage

CELL = 160
"""Side of a picture on a sheet in pixels."""


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

    @property
    def count(self) -> int:
        """Pictures that were made."""
        return sum(cell.made for _, cells in self.rows for cell in cells)

    def write(self, out: str, metadata: Mapping[str, Any]) -> str:
        """Writes SIZE/ROW-COLUMN.png with what they are and `metadata`, then sheet.png; returns the sheet's address."""
        for row, (caption, cells) in enumerate(self.rows):
            for column, cell in enumerate(cells):
                about = {"row": caption, "column": self.columns[column], **_texts(metadata)}
                for size, picture in cell.images.items() if cell.made else ():
                    write_png(picture, storage.join(out, str(size), f"{row:03d}-{column:03d}.png"), about)
        sheet = storage.join(out, "sheet.png")
        rows = [(caption, [cell.largest for cell in cells]) for caption, cells in self.rows]
        write_grid(captioned_grid(rows, self.columns, cell=CELL), sheet)
        return sheet


def given(picture: npt.NDArray[np.uint8]) -> Cell:
    """A picture that came from outside."""
    return Cell({len(picture): picture}, made=False)


def cells_of(output: CascadeOutput) -> list[Cell]:
    """A cell for each picture of the output."""
    count = len(next(iter(output.images.values())))
    return [Cell({size: pictures[row] for size, pictures in output.images.items()}) for row in range(count)]


def _texts(metadata: Mapping[str, Any]) -> dict[str, str]:
    return {
        key: value if isinstance(value, str) else json.dumps(value, sort_keys=True) for key, value in metadata.items()
    }
