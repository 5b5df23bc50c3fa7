"""Parquet as a source: rows as they are in the files, whatever form the columns have; files that disagree or are broken."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unclip.data.manifest import DataError
from unclip.data.sources import RAW_SCHEMA, ParquetSourceConfig


def write(path: Path, columns: dict[str, Any], row_group_size: int = 4) -> None:
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)


def columns(first: int, count: int, **further: Any) -> dict[str, Any]:
    numbers = range(first, first + count)
    return {
        "image": pa.array([b"picture %d" % n for n in numbers], pa.binary()),
        "caption": pa.array([f"caption {n}" for n in numbers]),
        **further,
    }


def read(uri: Path | str, **settings: Any) -> list[dict[str, Any]]:
    source = ParquetSourceConfig(uri=str(uri), **settings).build()
    tables = [table for part in source.parts() for table in source.read(part)]
    assert all(table.schema == source.schema() for table in tables)
    return [row for table in tables for row in table.to_pylist()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "b.parquet", columns(6, 3, score=[0.5, None, 2.0]))
    write(tmp_path / "a.parquet", columns(0, 6, score=[float(n) for n in range(6)]))
    return tmp_path


def test_a_part_is_a_row_group(folder: Path) -> None:
    source = ParquetSourceConfig(uri=str(folder)).build()
    parts = source.parts()
    assert [part.name for part in parts] == ["a.parquet#0", "a.parquet#1", "b.parquet#0"]
    assert [sum(table.num_rows for table in source.read(part)) for part in parts] == [4, 2, 3]
    again = pickle.loads(pickle.dumps(parts[1]))
    assert pa.concat_tables(source.read(again)).equals(pa.concat_tables(source.read(parts[1])))


def test_rows_are_those_of_the_files(folder: Path) -> None:
    rows = read(folder)
    assert [row["image"] for row in rows] == [b"picture %d" % n for n in range(9)]
    assert [row["caption"] for row in rows] == [f"caption {n}" for n in range(9)]
    assert [row["score"] for row in rows] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 0.5, None, 2.0]
    assert [row["key"] for row in rows][3:7] == ["a.parquet:3", "a.parquet:4", "a.parquet:5", "b.parquet:0"]
    assert {row["reason"] for row in rows} == {None}


def test_types_of_further_columns_are_kept(tmp_path: Path) -> None:
    further = {
        "embed": pa.array([[0.5, 1.0]], pa.list_(pa.float16(), 2)),
        "tags": pa.array([["a", "b"]]),
        "when": pa.array([1], pa.timestamp("ms")),
        "kind": pa.array(["x"]).dictionary_encode(),
    }
    write(tmp_path / "a.parquet", columns(0, 1, **further))
    schema = ParquetSourceConfig(uri=str(tmp_path)).build().schema()
    assert schema.names == [*RAW_SCHEMA.names, *further]
    for name in ("embed", "tags", "when"):
        assert schema.field(name).type == further[name].type
    assert schema.field("kind").type == pa.string()
    assert read(tmp_path)[0]["embed"] == [0.5, 1.0]


@pytest.mark.parametrize(
    "kind",
    [pa.binary(), pa.large_binary(), pa.binary(3), pa.dictionary(pa.int32(), pa.binary())],
    ids=str,
)
def test_forms_of_the_picture_column(tmp_path: Path, kind: pa.DataType) -> None:
    write(tmp_path / "a.parquet", {"image": pa.array([b"abc", b"def"], pa.binary()).cast(kind), "caption": ["1", "2"]})
    rows = read(tmp_path)
    assert [(row["image"], row["reason"]) for row in rows] == [(b"abc", None), (b"def", None)]


def test_pictures_in_structs(tmp_path: Path) -> None:
    pictures = [{"bytes": b"a", "path": None}, {"bytes": None, "path": "x.jpg"}, None, {"bytes": b"d", "path": "d.jpg"}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    write(tmp_path / "a.parquet", {"img": pa.array(pictures, kind), "text": ["1", "2", "3", None]})
    rows = read(tmp_path, image_column="img", caption_column="text")
    assert [row["image"] for row in rows] == [b"a", None, None, b"d"]
    assert [row["reason"] for row in rows] == [None, "no_image", "no_image", None]
    assert "x.jpg" in rows[1]["detail"]
    assert [row["caption"] for row in rows] == ["1", "2", "3", None]


def test_columns_by_name(folder: Path) -> None:
    write(folder / "a.parquet", columns(0, 2, url=["u0", None], score=[1.0, 2.0], reason=["r", "s"]))
    write(folder / "b.parquet", columns(2, 1, url=["u2"], score=[3.0], reason=["t"]))
    rows = read(folder, key_column="url", caption_column=None, columns=("score",))
    assert [row["key"] for row in rows] == ["u0", "a.parquet:1", "u2"]
    assert [row["caption"] for row in rows] == [None] * 3
    assert list(rows[0]) == [*RAW_SCHEMA.names, "score"]


def test_captions_that_are_not_utf8(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"bad \xff", None, "gut é".encode()], pa.binary())
    for name, column in (("bytes", raw), ("text", pa.Array.from_buffers(pa.string(), 4, raw.buffers()))):
        write(tmp_path / f"{name}.parquet", {"image": [b"x"] * 4, "caption": column})
        rows = read(tmp_path / f"{name}.parquet")
        assert [row["caption"] for row in rows] == ["good", "bad \ufffd", None, "gut é"]
        assert [row["reason"] for row in rows] == [None, "invalid_utf8", None, None]


def test_tables_are_bounded(tmp_path: Path) -> None:
    write(tmp_path / "small.parquet", columns(0, 700), row_group_size=700)
    source = ParquetSourceConfig(uri=str(tmp_path)).build()
    assert [table.num_rows for table in source.read(source.parts()[0])] == [256, 256, 188]
    large = {"image": pa.array([bytes([n]) * (16 << 20) for n in range(9)], pa.large_binary()), "caption": ["c"] * 9}
    pq.write_table(pa.table(large), tmp_path / "small.parquet", compression="none", use_dictionary=False)
    assert max(table.num_rows for table in source.read(source.parts()[0])) == 3  # rows of 16 MiB and a little
    assert [row["image"][0] for row in read(tmp_path)] == list(range(9))


def test_object_store(folder: Path) -> None:
    fsspec.filesystem("memory").put(str(folder), "/bucket/pictures", recursive=True)
    assert read("memory://bucket/pictures") == read(folder)
    assert read("memory://bucket/pictures/b*.parquet") == read(folder / "b.parquet")


DRIFT: dict[str, tuple[dict[str, Any], str]] = {
    "no image": ({"caption": ["c"], "score": [1.0]}, "no column 'image'"),
    "image is text": ({"image": ["i"], "caption": ["c"], "score": [1.0]}, "column 'image' is string"),
    "no caption": ({"image": [b"i"], "score": [1.0]}, "no column 'caption'"),
    "caption is a number": ({"image": [b"i"], "caption": [1], "score": [1.0]}, "column 'caption' is int64"),
    "no score": ({"image": [b"i"], "caption": ["c"]}, "no column 'score'"),
    "score is text": ({"image": [b"i"], "caption": ["c"], "score": ["1.0"]}, "column 'score' is string"),
}


@pytest.mark.parametrize("case", DRIFT)
def test_files_that_disagree_with_the_first(folder: Path, case: str) -> None:
    content, detail = DRIFT[case]
    expected = read(folder)
    write(folder / "aa.parquet", {name: values * 3 for name, values in content.items()}, row_group_size=2)
    rows = read(folder)
    drifted = [row for row in rows if row["reason"] is not None]
    assert [row["key"] for row in drifted] == ["aa.parquet:0", "aa.parquet:1", "aa.parquet:2"]
    assert {row["reason"] for row in drifted} == {"schema_drift"}
    assert all(detail in row["detail"] and "aa.parquet" in row["detail"] for row in drifted)
    assert [row for row in rows if row["reason"] is None] == expected


@pytest.mark.parametrize("kind", [pa.float32(), pa.int8(), pa.int64(), pa.null()], ids=str)
def test_types_that_fit_into_the_first_files_are_converted(folder: Path, kind: pa.DataType) -> None:
    value = None if pa.types.is_null(kind) else 3
    write(folder / "c.parquet", columns(9, 1, score=pa.array([value], kind)))
    row = read(folder)[-1]
    assert (row["reason"], row["score"]) == (None, value)


def test_dictionaries_and_large_types_are_the_same_text(folder: Path) -> None:
    write(folder / "a.parquet", columns(0, 1, lang=["en"], score=[1.0]))
    write(folder / "b.parquet", columns(1, 1, lang=pa.array(["de"], pa.large_string()), score=[1.0]))
    write(folder / "c.parquet", columns(2, 1, lang=pa.array(["fr"]).dictionary_encode(), score=[1.0]))
    assert [(row["lang"], row["reason"]) for row in read(folder)] == [("en", None), ("de", None), ("fr", None)]


@pytest.mark.parametrize("content", [b"", b"not parquet", b"PAR1" + b"\0" * 100, b"PAR1\xff\xff\xff\x7fPAR1"])
def test_file_that_is_no_parquet_is_one_row(folder: Path, content: bytes) -> None:
    expected = read(folder)
    for name in ("0.parquet", "aa.parquet"):  # before the first that can be read, and between
        (folder / name).write_bytes(content)
    rows = read(folder)
    bad = [row for row in rows if row["reason"] is not None]
    assert [(row["key"], row["reason"]) for row in bad] == [
        ("0.parquet#0", "unreadable_shard"),
        ("aa.parquet#0", "unreadable_shard"),
    ]
    assert [row for row in rows if row["reason"] is None] == expected


def damaged(path: Path, row_group: int, page_from: int) -> None:
    """600 rows, 300 a row group, of whose second page from byte `page_from` of the pictures nothing can be read."""
    content = {"image": [b"%06d" % n for n in range(600)], "caption": [str(n) for n in range(600)]}
    pq.write_table(
        pa.table(content), path, row_group_size=300, use_dictionary=False, data_page_size=300, compression="none"
    )
    raw = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(row_group).column(0).data_page_offset + page_from
    raw[start : start + 64] = b"\xff" * 64
    path.write_bytes(raw)


@pytest.mark.parametrize("page_from", [0, 290 * 10], ids=["first page", "last pages"])
def test_damaged_pages_end_their_row_group_alone(tmp_path: Path, page_from: int) -> None:
    """Every row that is not read is one bad row, with the name it would have had."""
    damaged(tmp_path / "a.parquet", 1, page_from)
    rows = read(tmp_path)
    assert [row["key"] for row in rows] == [f"a.parquet:{number}" for number in range(600)]
    read_rows = [row for row in rows if row["reason"] is None]
    assert len(read_rows) == (300 if page_from == 0 else 556)
    assert rows[: len(read_rows)] == read_rows
    assert [row["image"] for row in read_rows] == [b"%06d" % n for n in range(len(read_rows))]
    unread = rows[len(read_rows) :]
    assert {row["reason"] for row in unread} == {"unreadable_shard"}
    assert {f"breaks after {len(read_rows) - 300} rows" in row["detail"] for row in unread} == {True}


def check(uri: Path, **settings: Any) -> None:
    ParquetSourceConfig(uri=str(uri), **settings).build().parts()


def test_what_the_first_file_lacks_is_said_at_the_start(folder: Path) -> None:
    with pytest.raises(DataError, match=r"a\.parquet' has 0 columns 'jpg'; it has image, caption, score"):
        check(folder, image_column="jpg")
    with pytest.raises(DataError, match="0 columns 'text'"):
        check(folder, caption_column="text")
    with pytest.raises(DataError, match="0 columns 'nsfw'"):
        check(folder, columns=("nsfw",))
    with pytest.raises(DataError, match="column 'caption' is string"):
        check(folder, image_column="caption", caption_column=None, columns=())
    with pytest.raises(DataError, match="id_column 'score' is no int64 column"):
        check(folder, id_column="score")
    write(folder / "a.parquet", columns(0, 1, number=[1]))
    with pytest.raises(DataError, match="column 'number' is int64; keys are text"):
        check(folder, key_column="number")
    write(folder / "a.parquet", columns(0, 1, reason=["r"]))
    with pytest.raises(DataError, match="column 'reason' cannot be carried"):
        check(folder)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no file"):
        check(tmp_path)
    write(tmp_path / "a.parquet", {"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())})
    with pytest.raises(DataError, match="hold no rows"):
        check(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match="no file can be read"):
        check(tmp_path)


def test_own_ids(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", columns(0, 2, id=[7, 8]))
    assert [row["id"] for row in read(tmp_path, id_column="id")] == [7, 8]
