"""A folder of pictures with their captions, for those who have none at hand: `python examples/openmoji_pictures.py pictures`.

Drawings of OpenMoji (CC BY-SA 4.0), NAME.png with the caption in NAME.txt. Needs the `demo` extra.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from unclip.config.base import Config
from unclip.config.cli import parse_flags
from unclip.data.openmoji import load_drawings, render


class PicturesConfig(Config):
    """Which drawings, and where."""

    folder: str
    """Folder that they are written to."""
    count: int = Field(default=100, ge=1)
    """How many; coloured shapes come first."""
    size: int = Field(default=512, ge=8)
    """Their side in pixels."""


def write_pictures(config: PicturesConfig) -> None:
    """Writes the drawings, each with its caption beside it."""
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawings = sorted(load_drawings()[0], key=lambda drawing: drawing.shape is None)
    for drawing in drawings[: config.count]:
        (folder / f"{drawing.hexcode}.png").write_bytes(render(drawing.svg_path, config.size))
        (folder / f"{drawing.hexcode}.txt").write_text(drawing.caption + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    write_pictures(parse_flags(__doc__ or "", PicturesConfig, argv, positional="folder"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
