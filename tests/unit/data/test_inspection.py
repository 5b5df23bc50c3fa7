"""The report on a folder of records: its sample, its counts, its pictures."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from unclip.config.base import ConfigError
from unclip.data.inspection import (
    InspectConfig,
    clip_similarity,
    inspect,
    picture_facts,
    read_quarantine,
    read_sample,
    sample_rows,
)
from unclip.data.manifest import scan


def jpeg(width: int, height: int) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (width, height), (200, 40, 40)).save(sink, "JPEG")
    return sink.getvalue()


def write_records(folder: Path, rows: int, row_group_size: int, **more: pa.Array) -> None:
    table = pa.table(
        {
            "id": pa.array(range(rows), pa.int64()),
            "image": pa.array([jpeg(64 + i % 3, 48) for i in range(rows)], pa.large_binary()),
            "caption": pa.array([f"picture <{i}>" for i in range(rows)]),
            **more,
        }
    )
    pq.write_table(table, folder / "data-00000.parquet", row_group_size=row_group_size)


def rejected(row: int, reason: str, *, thumbnail: bytes | None) -> dict[str, Any]:
    names = {"source": "tars", "part": "a.tar", "key": f"{row:05d}", "caption": "x"}
    return {"id": 1000 + row, **names, "reason": reason, "detail": f"{reason} of {row}", "thumbnail": thumbnail}


def test_the_sample_is_spread_over_row_groups_and_repeats_with_its_seed(tmp_path: Path) -> None:
    write_records(tmp_path, 100, 10)
    manifest = scan(str(tmp_path), ("id",))
    slices = sample_rows(manifest, 30, np.random.default_rng(1))
    assert [stop - start for _, start, stop in slices] == [3] * 10
    assert slices == sample_rows(manifest, 30, np.random.default_rng(1))
    assert slices != sample_rows(manifest, 30, np.random.default_rng(2))
    ids = read_sample(manifest, slices).column("id").to_pylist()
    assert [i // 10 for i in ids] == [group for group in range(10) for _ in range(3)]


def test_a_sample_larger_than_the_data_is_all_of_it(tmp_path: Path) -> None:
    write_records(tmp_path, 20, 10)
    manifest = scan(str(tmp_path), ("id",))
    table = read_sample(manifest, sample_rows(manifest, 500, np.random.default_rng(0)))
    assert table.column("id").to_pylist() == list(range(20))


def test_sizes_are_those_of_the_stored_pictures_and_broken_ones_have_none() -> None:
    table = pa.table({"id": [1, 2, 3], "image": pa.array([jpeg(300, 200), b"no picture", None], pa.large_binary())})
    sizes, thumbnails = picture_facts(table, 100)
    assert sizes[0].tolist() == [300, 200]
    assert np.isnan(sizes[1:]).all()
    assert thumbnails[1] is None
    assert thumbnails[2] is None
    assert thumbnails[0] is not None
    with Image.open(io.BytesIO(thumbnails[0][0])) as image:
        assert image.size == (100, 67)


def test_similarity_is_the_cosine_of_each_pair() -> None:
    def column(vectors: list[list[float]]) -> pa.Array:
        flat = np.array(vectors, dtype=np.float16).reshape(-1)
        return pa.FixedSizeListArray.from_arrays(pa.array(flat), 2)

    table = pa.table({"image_embed": column([[1, 0], [3, 4]]), "text_embed": column([[0, 2], [6, 8]])})
    similarity = clip_similarity(table)
    assert similarity is not None
    np.testing.assert_allclose(similarity, [0, 1])
    assert clip_similarity(table.drop_columns(["text_embed"])) is None


def test_the_quarantine_is_counted_by_reason_with_some_examples_of_each(tmp_path: Path) -> None:
    (tmp_path / "quarantine").mkdir()
    rows = [rejected(i, "too_small", thumbnail=jpeg(8, 8)) for i in range(5)]
    rows += [rejected(i, "duplicate", thumbnail=None) for i in range(2)]
    pq.write_table(pa.Table.from_pylist(rows[:4]), tmp_path / "quarantine" / "part-0.parquet")
    pq.write_table(pa.Table.from_pylist(rows[4:]), tmp_path / "quarantine" / "part-1.parquet")
    quarantine = read_quarantine(str(tmp_path), 3)
    assert quarantine.counts == {"too_small": 5, "duplicate": 2}
    assert [row["key"] for row in quarantine.examples["too_small"]] == ["00000", "00001", "00002"]
    assert (quarantine.files, quarantine.files_read) == (2, 2)


def test_the_report_holds_counts_pictures_and_captions_as_text(tmp_path: Path) -> None:
    write_records(tmp_path, 12, 4)
    (tmp_path / "quarantine").mkdir()
    rows = [rejected(0, "too_small", thumbnail=jpeg(8, 8)), rejected(1, "not_a_picture", thumbnail=None)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "quarantine" / "part-0.parquet")
    counts = {"rows_in": 15, "kept": 12, "duplicates": 1, "near_duplicates": 0}
    counts |= {"quarantined": {"too_small": 1, "not_a_picture": 1}}
    (tmp_path / "manifest.json").write_text(json.dumps({"counts": counts}))
    facts = inspect(InspectConfig(data=str(tmp_path), out=str(tmp_path / "report.html"), pictures=5))
    html = (tmp_path / "report.html").read_text()
    assert facts == {"rows": 12, "sample": 12, "out": str(tmp_path / "report.html")}
    assert html.count("<img ") == 5 + 1
    assert "The counts add up." in html
    assert "picture &lt;" in html
    assert "not_a_picture of 1" in html
    assert "characters of a caption" in html


def test_counts_that_do_not_add_up_are_said_to(tmp_path: Path) -> None:
    write_records(tmp_path, 4, 4)
    counts = {"rows_in": 9, "kept": 4, "quarantined": {}, "duplicates": 1, "near_duplicates": 0}
    (tmp_path / "manifest.json").write_text(json.dumps({"counts": counts}))
    inspect(InspectConfig(data=str(tmp_path), out=str(tmp_path / "report.html")))
    assert "The counts give 5 rows." in (tmp_path / "report.html").read_text()


def test_a_dry_run_writes_nothing_and_missing_data_is_named(tmp_path: Path) -> None:
    write_records(tmp_path, 4, 4)
    out = tmp_path / "report.html"
    assert inspect(InspectConfig(data=str(tmp_path), out=str(out)), dry_run=True)["rows"] == 4
    assert not out.exists()
    with pytest.raises(ConfigError, match="data: required"):
        inspect(InspectConfig())
