"""Records of drawn shapes whose captions leave things open, made from nothing: pictures that small networks learn in a minute.

Every picture has a colour, a shape, a size, a place and a ground. The caption says colour and shape, and each of the others
half of the time: so one caption fits many pictures, as captions do in the world, and as a prior is there for.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from unclip.data.ingest.shards import records_sha256, write_tables
from unclip.data.manifest import FACTS_FILE
from unclip.utils import storage

SCHEMA_VERSION = 1
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 150, 30),
    "green": (50, 160, 70),
    "blue": (40, 90, 200),
    "purple": (140, 60, 170),
    "black": (30, 30, 34),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": (0.16, 0.21), "large": (0.28, 0.34)}
"""Radius in sides of the picture: from, to."""
PLACES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "centre": (0, 0)}
GROUNDS = {"white": (250, 250, 250), "grey": (176, 176, 182), "pink": (246, 200, 212), "yellow": (250, 236, 150)}
SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("image", pa.large_binary(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        *(pa.field(name, pa.string(), nullable=False) for name in ("colour", "shape", "size", "place", "ground")),
    ]
)
_ROWS_PER_GROUP = 256
_FINER = 4
"""Pixels of the drawing for each of the picture's, in a row: edges are smooth."""


def draw_shapes(uri: str, *, rows: int, side: int, seed: int) -> None:
    """Writes `rows` records with pictures of `side` pixels into the folder `uri`, `manifest.json` last.

    The same arguments give the same bytes. What is there already by the same arguments is kept, anything else made anew.
    """
    facts = {"schema_version": SCHEMA_VERSION, "source": "drawn shapes", "seed": seed, "image_size": side, "rows": rows}
    manifest = storage.join(uri, FACTS_FILE)
    if storage.exists(manifest) and facts.items() <= storage.read_json(manifest).items():
        return
    storage.remove(uri)
    shard = write_tables(storage.join(uri, "data-00000.parquet"), SCHEMA, _tables(rows, side, seed))
    storage.write_json(manifest, facts | {"shards": [shard], "records_sha256": records_sha256([shard])})


def _tables(rows: int, side: int, seed: int) -> Iterator[pa.Table]:
    for start in range(0, rows, _ROWS_PER_GROUP):
        numbers = range(start, min(start + _ROWS_PER_GROUP, rows))
        records = [_record(np.random.default_rng((seed, number)), side) | {"id": number} for number in numbers]
        yield pa.Table.from_pylist(records, SCHEMA)


def _record(random: np.random.Generator, side: int) -> dict[str, str | bytes]:
    chosen = {
        name: str(random.choice(list(values)))
        for name, values in {
            "colour": COLOURS,
            "shape": SHAPES,
            "size": SIZES,
            "place": PLACES,
            "ground": GROUNDS,
        }.items()
    }
    said = {name: bool(random.random() < 0.5) for name in ("size", "place", "ground")}
    return {**chosen, "caption": _caption(chosen, said), "image": _picture(chosen, random, side)}


def _caption(chosen: dict[str, str], said: dict[str, bool]) -> str:
    words = [chosen["size"]] if said["size"] else []
    words += [chosen["colour"], chosen["shape"]]
    if said["place"]:
        words += ["at the", chosen["place"]]
    if said["ground"]:
        words += ["on", chosen["ground"]]
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def _picture(chosen: dict[str, str], random: np.random.Generator, side: int) -> bytes:
    """PNG. Radius, turn and the exact place are nowhere said."""
    radius = random.uniform(*SIZES[chosen["size"]])
    room = 0.48 - radius
    direction, jitter = np.array(PLACES[chosen["place"]]), random.uniform(-0.05, 0.05, 2)
    centre = 0.5 + np.clip(direction * room + jitter, -room, room)
    fine = side * _FINER
    page = Image.new("RGB", (fine, fine), GROUNDS[chosen["ground"]])
    _draw(ImageDraw.Draw(page), chosen, fine * centre, fine * radius, turn=random.uniform(-0.25, 0.25))
    buffer = io.BytesIO()
    page.reduce(_FINER).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _draw(draw: ImageDraw.ImageDraw, chosen: dict[str, str], centre: np.ndarray, radius: float, *, turn: float) -> None:
    colour, shape = COLOURS[chosen["colour"]], chosen["shape"]
    if shape in ("circle", "ring"):
        draw.ellipse((*(centre - radius), *(centre + radius)), fill=colour)
        if shape == "ring":
            hole = radius * 0.55
            draw.ellipse((*(centre - hole), *(centre + hole)), fill=GROUNDS[chosen["ground"]])
        return
    angles, distances = _CORNERS[shape]
    points = np.stack([np.sin(angles + turn), -np.cos(angles + turn)], axis=1) * distances[:, None]
    draw.polygon([tuple(point) for point in centre + radius * points], fill=colour)


def _regular(corners: int, first: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    return first + 2 * np.pi * np.arange(corners) / corners, np.ones(corners)


def _cross(arm: float = 0.32) -> tuple[np.ndarray, np.ndarray]:
    x = np.array([arm, 1, 1, arm, arm, -arm, -arm, -1, -1, -arm, -arm, arm])
    y = np.array([arm, arm, -arm, -arm, -1, -1, -arm, -arm, arm, arm, 1, 1])
    return np.arctan2(x, y), np.hypot(x, y)


_CORNERS = {
    "square": _regular(4, first=np.pi / 4),
    "triangle": _regular(3),
    "star": (2 * np.pi * np.arange(10) / 10, np.tile([1.0, 0.42], 5)),
    "cross": _cross(),
}
"""Directions, clockwise from above, and distances of the corners, in radii."""
