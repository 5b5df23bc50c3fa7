"""Records of one or two squares in three colours, and a judge that has learned them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from unclip.evaluation.judge.config import TrainJudgeConfig

COLOURS = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255)}
COUNTS = ("1", "2")
COMBINATIONS = [(colour, count) for colour in COLOURS for count in COUNTS]


def squares(colour: str, count: str, random: np.random.Generator) -> np.ndarray:
    """uint8 (16, 16, 3): squares on paper that is nearly white, one beside the other."""
    picture = random.integers(245, 256, size=(16, 16, 3), dtype=np.uint8)
    left, top = random.integers(1, 4, size=2)
    for number in range(int(count)):
        x = left + 7 * number
        picture[top + 4 : top + 9, x : x + 5] = COLOURS[colour]
    return picture


def caption_of(number: int) -> str:
    """A text of its own for each number below 1000, which says the number's combination."""
    colour, count = COMBINATIONS[number % len(COMBINATIONS)]
    return f"{'one' if count == '1' else 'two'} {colour}, drawing {number}"


def write_squares(folder: Path, numbers: Sequence[int], *, seed: int, captions: Sequence[str] | None = None) -> str:
    """A record for each number, in row groups of 64: pictures differ between seeds, captions and attributes do not."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    images = []
    for number in numbers:
        sink = io.BytesIO()
        Image.fromarray(squares(*COMBINATIONS[number % len(COMBINATIONS)], random)).save(sink, "PNG")
        images.append(sink.getvalue())
    shown = [COMBINATIONS[number % len(COMBINATIONS)] for number in numbers]
    columns = {
        "id": pa.array(list(numbers), pa.int64()),
        "image": pa.array(images, pa.large_binary()),
        "caption": captions or [caption_of(number) for number in numbers],
        "colour": [colour for colour, _ in shown],
        "count": [count for _, count in shown],
    }
    pq.write_table(pa.table(columns), folder / "data-00000.parquet", row_group_size=64)
    return str(folder)


def judge_config(folder: str, out: Path, **changes: object) -> TrainJudgeConfig:
    """Learns squares within seconds."""
    settings = {
        "records": [folder],
        "out": str(out),
        "attributes": ["colour", "count"],
        "image_size": 16,
        "folds": 2,
        "steps": 60,
        "batch_size": 32,
        "learning_rate": 0.01,
        "width": 4,
    }
    return TrainJudgeConfig.from_dict(settings | changes)
