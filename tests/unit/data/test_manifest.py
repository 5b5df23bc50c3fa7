"""Scanning and reading folders of Parquet: what is found, and what is said about folders that cannot be used."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unclip.data.manifest import DataError, Fragment, read_slices, scan


def write(path: Path, ids: list[int], row_group_size: int = 4, id_type: str = "int64") -> None:
    table = pa.table(
        {
            "id": pa.array(ids, pa.int64()).cast(id_type),
            "image": pa.array([b"x%d" % i for i in ids], pa.large_binary()),
            "caption": pa.array([f"picture {i}" for i in ids], pa.string()),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "part-00001.parquet", list(range(10, 16)))
    write(tmp_path / "part-00000.parquet", list(range(10)))
    (tmp_path / "manifest.json").write_text(json.dumps({"clip_fingerprint": "abc"}))
    return tmp_path


def test_fragments_are_row_groups_of_files_sorted_by_name(folder: Path) -> None:
    manifest = scan(str(folder), columns=("id", "image"))
    assert [(f.file, f.row_group, f.rows) for f in manifest.fragments] == [
        ("part-00000.parquet", 0, 4),
        ("part-00000.parquet", 1, 4),
        ("part-00000.parquet", 2, 2),
        ("part-00001.parquet", 0, 4),
        ("part-00001.parquet", 1, 2),
    ]
    assert manifest.rows == 16
    assert manifest.columns == ("id", "image", "caption")
    assert manifest.facts == {"clip_fingerprint": "abc"}
    assert pickle.loads(pickle.dumps(manifest)) == manifest


def test_slices_are_read_in_their_order(folder: Path) -> None:
    manifest = scan(str(folder))
    table = read_slices(manifest, [(4, 0, 2), (1, 1, 3), (0, 0, 1)], columns=("id", "caption"))
    assert table.column_names == ["id", "caption"]
    assert table.column("id").to_pylist() == [14, 15, 5, 6, 0]
    assert table.column("caption").to_pylist()[0] == "picture 14"


def test_object_store_addresses_work(folder: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/bucket/records", recursive=True)
    manifest = scan("memory://bucket/records", columns=("id",))
    assert manifest.rows == 16
    assert read_slices(manifest, [(3, 0, 4)], ("id",)).column("id").to_pylist() == [10, 11, 12, 13]


def test_fragments_without_rows_are_skipped(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [])
    write(tmp_path / "b.parquet", [1])
    assert scan(str(tmp_path)).fragments == (Fragment("b.parquet", 0, 1),)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere' does not exist"):
        scan(str(tmp_path / "nowhere"))


def test_folder_without_parquet(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(DataError, match=r"holds no \*\.parquet"):
        scan(str(tmp_path))


def test_no_rows(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [])
    with pytest.raises(DataError, match="hold no rows"):
        scan(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"not parquet at all", b"PAR1" + b"\0" * 100])
def test_unreadable_file_is_named(folder: Path, content: bytes) -> None:
    (folder / "part-00002.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"part-00002\.parquet' is not readable Parquet"):
        scan(str(folder))


def test_truncated_file_is_named_when_it_is_read(folder: Path) -> None:
    manifest = scan(str(folder))
    path = folder / "part-00000.parquet"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match=r"part-00000\.parquet' cannot be read"):
        read_slices(manifest, [(0, 0, 4)], ("id",))


def test_missing_column_is_named_with_those_there(folder: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'image_embed'; it has id, image, caption"):
        scan(str(folder), columns=("id", "image_embed"))


def test_column_that_changes_its_type(folder: Path) -> None:
    write(folder / "part-00002.parquet", [1], id_type="string")
    with pytest.raises(DataError, match=r"part-00002\.parquet': column 'id' is string, in the first file int64"):
        scan(str(folder), columns=("id",))
