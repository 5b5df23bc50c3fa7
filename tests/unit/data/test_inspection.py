"""The report on a folder of records: its sample, its counts, its pictures."""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
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
    contact_sheet,
    inspect,
    picture_sizes,
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


def test_row_groups_that_are_too_small_for_their_share_leave_it_to_others(tmp_path: Path) -> None:
    table = pa.table({"id": np.arange(103)})
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for start, stop in ((0, 1), (1, 3), (3, 103)):
            writer.write_table(table.slice(start, stop - start))
    manifest = scan(str(tmp_path), ("id",))
    for rows, expected in ((50, [1, 2, 47]), (5, [1, 2, 2]), (103, [1, 2, 100]), (999, [1, 2, 100])):
        slices = sample_rows(manifest, rows, np.random.default_rng(0))
        assert [stop - start for _, start, stop in slices] == expected
    out = str(tmp_path / "report.html")
    assert inspect(InspectConfig(data=str(tmp_path), out=out, rows=50)) == {"rows": 103, "sample": 50, "out": out}
    assert "103 records in 3 row groups; histograms and pictures show 50 of them" in Path(out).read_text()


def test_a_sample_larger_than_the_data_is_all_of_it(tmp_path: Path) -> None:
    write_records(tmp_path, 20, 10)
    manifest = scan(str(tmp_path), ("id",))
    table = read_sample(manifest, sample_rows(manifest, 500, np.random.default_rng(0)))
    assert table.column("id").to_pylist() == list(range(20))


def test_sizes_are_those_of_the_stored_pictures_and_broken_ones_have_none() -> None:
    table = pa.table({"id": [1, 2, 3], "image": pa.array([jpeg(300, 200), b"no picture", None], pa.large_binary())})
    sizes, problems = picture_sizes(table)
    assert sizes[0].tolist() == [300, 200]
    assert np.isnan(sizes[1:]).all()
    assert [problem[:2] for problem in problems] == [("2", "not_a_picture"), ("3", "not_a_picture")]
    ((content, media, text),) = contact_sheet(table, ["one", "two", ""], [2, 1, 0], most=5)
    assert (media, text) == ("image/jpeg", "one (1)")
    with Image.open(io.BytesIO(content)) as image:
        assert image.size == (128, 85)


def test_sizes_are_those_of_the_upright_picture() -> None:
    exif, sink = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(sink, "JPEG", exif=exif)
    sizes, _ = picture_sizes(pa.table({"id": [1], "image": pa.array([sink.getvalue()], pa.large_binary())}))
    assert sizes.tolist() == [[20, 30]]


def test_similarity_is_the_cosine_of_each_pair() -> None:
    def column(vectors: list[list[float]]) -> pa.Array:
        flat = np.array(vectors, dtype=np.float16).reshape(-1)
        return pa.FixedSizeListArray.from_arrays(pa.array(flat), 2)

    lost = pa.concat_arrays([column([[0, 2], [6, 8]]), pa.nulls(1, pa.list_(pa.float16(), 2))])
    table = pa.table({"image_embed": column([[1, 0], [3, 4], [1, 1]]), "text_embed": lost})
    similarity = clip_similarity(table)
    assert similarity is not None
    np.testing.assert_allclose(similarity, [0, 1, np.nan])
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


def test_of_very_many_quarantine_tables_64_are_read(tmp_path: Path) -> None:
    (tmp_path / "quarantine").mkdir()
    for number in range(130):
        rows = [rejected(number, "too_small", thumbnail=None)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "quarantine" / f"part-{number:05d}.parquet")
    quarantine = read_quarantine(str(tmp_path), 200)
    assert quarantine.files == 130
    assert 32 < quarantine.files_read <= 64
    assert quarantine.examples["too_small"][-1]["id"] > 1120  # from all over them, not the first


def test_at_most_64_row_groups_are_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": np.arange(400)}), tmp_path / "a.parquet", row_group_size=4)
    slices = sample_rows(scan(str(tmp_path)), 200, np.random.default_rng(0))
    assert len(slices) == 64
    assert slices[-1][0] > 80


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


def report(folder: Path, **settings: Any) -> str:
    inspect(InspectConfig(data=str(folder), out=str(folder / "report.html"), **settings))
    return (folder / "report.html").read_text()


def test_the_plots_of_a_record_s_numbers(tmp_path: Path) -> None:
    """All pictures are 64 to 66 wide and 48 high; cosines are 0.6."""
    rows = 30
    pairs = {"image_embed": [3, 4], "text_embed": [1, 0]}
    columns = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(np.array(pair * rows, np.float16)), 2)
        for name, pair in pairs.items()
    }
    write_records(tmp_path, rows, 10, **columns)
    plots = re.findall(r'<text x="0" y="-6">(.*?)</text>.*?>median (.*?), 30 values<', report(tmp_path))
    medians = dict(plots)
    assert float(medians["aspect, width / height"]) == pytest.approx(65 / 48, abs=1e-3)
    assert float(medians["CLIP similarity of picture and caption"]) == pytest.approx(0.6)
    assert float(medians["short side, pixels"]) == 48
    assert float(medians["megapixels"]) == pytest.approx(65 * 48 / 1e6)
    assert float(medians["words of a caption"]) == 2


def test_the_contact_sheet_is_a_random_choice_that_repeats_with_its_seed(tmp_path: Path) -> None:
    write_records(tmp_path, 40, 40)
    first, again, other = (
        re.findall(r"picture &lt;(\d+)&gt; \(", report(tmp_path, pictures=6, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert len({*map(tuple, (first, other, sorted(first, key=int), sorted(other, key=int)))}) == 4


def test_duplicates_have_a_section_of_their_own(tmp_path: Path) -> None:
    write_records(tmp_path, 4, 4)
    (tmp_path / "quarantine").mkdir()
    rows = [rejected(0, "near_duplicate", thumbnail=jpeg(8, 8)), rejected(1, "too_small", thumbnail=None)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "quarantine" / "part-0.parquet")
    before, _, after = report(tmp_path).partition("<h2>Duplicates found</h2>")
    assert "near_duplicate of 0" in after
    assert "near_duplicate of 0" not in before
    assert "too_small of 1" in before


def test_where_no_row_was_kept_the_quarantine_is_shown(tmp_path: Path) -> None:
    (tmp_path / "quarantine").mkdir()
    rows = [rejected(0, "too_small", thumbnail=jpeg(8, 8))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "quarantine" / "part-0.parquet")
    counts = {"rows_in": 1, "kept": 0, "quarantined": {"too_small": 1}, "duplicates": 0, "near_duplicates": 0}
    (tmp_path / "manifest.json").write_text(json.dumps({"counts": counts, "shards": []}))
    html = report(tmp_path)
    assert "too_small of 0" in html
    assert "The counts add up." in html
    assert html.count("<img ") == 1


def bomb() -> bytes:
    """A PNG whose header promises 40,000 by 40,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_what_is_wrong_with_other_peoples_records_is_shown(tmp_path: Path) -> None:
    text = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(struct.pack("<4i", 0, 4, 8, 8)), pa.py_buffer(b"good\xff\xfebc")]
    )
    table = pa.table({"id": [7, 8, 9], "caption": text, "text_embed": [[1.0], [2.0, 3.0], None]})
    pictures = pa.array([jpeg(8, 8), jpeg(9, 9), bomb()], pa.large_binary())
    pq.write_table(table.append_column("image", pictures), tmp_path / "theirs.parquet")
    html = report(tmp_path)
    assert "Of the sample: 1 caption_not_utf8, 1 too_large." in html
    assert re.search(r"<td>8</td><td>caption_not_utf8</td><td>.*invalid start byte", html)
    assert re.search(r"<td>9</td><td>too_large</td>", html)
    assert html.count("<img ") == 2
    assert "Not shown, being of types that this page does not know: text_embed." in html
