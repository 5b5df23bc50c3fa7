"""Drawn shapes: pictures are what their captions say, captions leave things open, and the same call gives the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from unclip.data.decode import decode_image
from unclip.data.manifest import scan
from unclip.data.shapes import COLOURS, GROUNDS, PLACES, SHAPES, draw_shapes


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = str(tmp_path_factory.mktemp("shapes"))
    draw_shapes(folder, rows=300, side=32, seed=0)
    assert scan(folder, ("id", "image", "caption")).rows == 300
    return pq.read_table(f"{folder}/data-00000.parquet").to_pylist()


def test_pictures_have_the_ground_in_their_corners_and_the_colour_where_the_place_says(records: list[dict]) -> None:
    for record in records:
        picture = decode_image(record["image"]).astype(int)
        assert picture.shape == (32, 32, 3)
        corners = picture[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert (np.abs(corners - GROUNDS[record["ground"]]).max(axis=1) <= 2).sum() >= 3  # a large square may reach one
        inside = (np.abs(picture - COLOURS[record["colour"]]) <= 3).all(axis=2)
        ys, xs = inside.nonzero()
        assert len(ys) > 10
        middle = np.array([xs.mean(), ys.mean()]) / 31 - 0.5
        direction = np.array(PLACES[record["place"]])
        assert np.abs(middle).max() < 0.12 if not direction.any() else middle @ direction > 0.05


def test_large_shapes_are_larger(records: list[dict]) -> None:
    def area(size: str, shape: str) -> float:
        chosen = [r for r in records if r["size"] == size and r["shape"] == shape]
        return float(
            np.mean(
                [
                    (np.abs(decode_image(r["image"]).astype(int) - COLOURS[r["colour"]]) <= 3).all(axis=2).sum()
                    for r in chosen
                ]
            )
        )

    assert all(area("large", shape) > 1.8 * area("small", shape) for shape in SHAPES)


def test_captions_say_colour_and_shape_always_and_the_rest_half_of_the_time(records: list[dict]) -> None:
    for record in records:
        words = record["caption"].split()
        assert record["colour"] in words
        assert record["shape"] in words
        for name, others in (("size", {"small", "large"}), ("place", set(PLACES)), ("ground", set(GROUNDS))):
            assert set(words) & others <= {record[name]}
    for name in ("size", "place", "ground"):
        said = np.mean([record[name] in record["caption"].split() for record in records])
        assert 0.4 < said < 0.6
    assert {record["caption"].split()[0] for record in records} == {"a", "an"}


def test_the_same_call_gives_the_same_bytes_and_another_draws_anew(tmp_path: Path) -> None:
    def drawn(name: str, seed: int) -> bytes:
        draw_shapes(str(tmp_path / name), rows=20, side=16, seed=seed)
        return (tmp_path / name / "data-00000.parquet").read_bytes()

    first = drawn("a", 0)
    assert drawn("b", 0) == first
    changed_at = (tmp_path / "a" / "data-00000.parquet").stat().st_mtime_ns
    assert drawn("a", 0) == first
    assert (tmp_path / "a" / "data-00000.parquet").stat().st_mtime_ns == changed_at
    assert drawn("a", 1) != first
