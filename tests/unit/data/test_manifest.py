"""Scanning and reading folders of Parquet: what is found, and what is said about folders that cannot be used."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unclip.data.manifest import (
    DataError,
    Fragment,
    SliceReader,
    check_same_types,
    read_slices,
    records_identity,
    scan,
)


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


@pytest.fixture
def listed(folder: Path) -> Path:
    """`folder` with its shards in manifest.json, as jobs write it."""
    shards = []
    for path in sorted(folder.glob("*.parquet")):
        footer = pq.read_metadata(path)
        groups = [footer.row_group(index).num_rows for index in range(footer.num_row_groups)]
        shards.append({"file": path.name, "rows": sum(groups), "bytes": path.stat().st_size, "row_groups": groups})
    relist(folder, shards)
    return folder


def shards_of(folder: Path) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = json.loads((folder / "manifest.json").read_text())["shards"]
    return shards


def relist(folder: Path, shards: object) -> None:
    (folder / "manifest.json").write_text(json.dumps({"clip_fingerprint": "abc", "shards": shards}))


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


def test_a_listed_folder_is_what_its_footers_say_without_reading_them(folder: Path, listed: Path) -> None:
    truth = scan(str(listed), columns=("id", "image"))
    (listed / "manifest.json").unlink()
    from_footers = scan(str(listed), columns=("id", "image"))
    assert (truth.fragments, truth.schema, truth.rows) == (from_footers.fragments, from_footers.schema, 16)
    assert truth.facts == {"clip_fingerprint": "abc"}


def test_of_a_listed_folder_only_the_first_footer_is_read(listed: Path) -> None:
    last = listed / "part-00001.parquet"
    last.write_bytes(b"\0" * last.stat().st_size)
    manifest = scan(str(listed), columns=("id",))
    assert manifest.rows == 16
    with pytest.raises(DataError, match=r"part-00001\.parquet' cannot be read"):
        read_slices(manifest, [(3, 0, 1)], ("id",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bytes": 7}, r"part-00000\.parquet' has \d+ bytes, manifest\.json says 7"),
        ({"file": "other.parquet"}, r"other\.parquet' is missing: manifest\.json lists it"),
        ({"file": "../part-00000.parquet"}, r"is missing"),
        ({"rows": 11}, r"part-00000\.parquet': its row groups in manifest\.json do not have its rows"),
        ({"row_groups": "many"}, "'shards' is not a list of files"),
    ],
)
def test_shards_that_are_not_as_listed(listed: Path, change: dict[str, Any], message: str) -> None:
    first, *others = shards_of(listed)
    relist(listed, [first | change, *others])
    with pytest.raises(DataError, match=message):
        scan(str(listed))


def test_files_that_are_not_listed(listed: Path) -> None:
    write(listed / "stray.parquet", [1])
    with pytest.raises(DataError, match=r"stray\.parquet' is not among the shards"):
        scan(str(listed))


def test_row_groups_that_are_not_as_listed(listed: Path) -> None:
    first, *others = shards_of(listed)
    relist(listed, [first | {"row_groups": [5, 4, 1]}, *others])
    manifest = scan(str(listed))
    with pytest.raises(DataError, match=r"part-00000\.parquet': row group 0 has 4 rows, expected 5"):
        read_slices(manifest, [(0, 0, 5)], ("id",))


@pytest.mark.parametrize("shards", [3, ["a.parquet"], [{"file": "part-00000.parquet"}]])
def test_a_manifest_that_lists_nonsense(folder: Path, shards: object) -> None:
    relist(folder, shards)
    with pytest.raises(DataError, match="'shards' is not a list of files"):
        scan(str(folder))


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_manifest_that_is_no_json_object(folder: Path, content: str) -> None:
    (folder / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json' is no"):
        scan(str(folder))


@pytest.mark.parametrize("work", ["_ingest", "_parts"])
def test_an_unfinished_folder(folder: Path, work: str) -> None:
    (folder / work).mkdir()
    assert scan(str(folder)).rows == 16  # what is left over beside a manifest does not matter
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=f"is unfinished: it has {work}/ but no manifest.json"):
        scan(str(folder))


def test_types_that_change_behind_the_first_file_of_a_listed_folder(listed: Path) -> None:
    last = listed / "part-00001.parquet"
    write(last, list(range(10, 16)), id_type="string")
    first, second = shards_of(listed)
    relist(listed, [first, second | {"bytes": last.stat().st_size}])
    with pytest.raises(DataError, match=r"part-00001\.parquet': column 'id' is string, in the first file int64"):
        read_slices(scan(str(listed)), [(0, 0, 1), (3, 0, 1)], ("id",))


def test_a_reader_of_two_folders_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    """Rows source after source; what begins in the row group that was read last is not read again."""
    write(tmp_path / "second" / "a.parquet", [100, 101, 102])
    manifests = [scan(str(folder)), scan(str(tmp_path / "second"))]
    reader = SliceReader(manifests, ("id",))
    first = reader.read([[(0, 0, 4), (1, 0, 2)], [(0, 0, 1)]])
    assert first.column("id").to_pylist() == [0, 1, 2, 3, 4, 5, 100]
    (folder / "part-00000.parquet").unlink()
    (tmp_path / "second" / "a.parquet").unlink()
    second = reader.read([[(1, 2, 4), (3, 0, 1)], [(0, 1, 3)]])
    assert second.column("id").to_pylist() == [6, 7, 10, 101, 102]
    with pytest.raises(DataError, match=r"part-00000\.parquet' cannot be read"):
        reader.read([[(2, 0, 1)], []])


def test_folders_of_other_types_are_not_mixed(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "second" / "a.parquet", [1], id_type="int32")
    manifests = [scan(str(folder)), scan(str(tmp_path / "second"))]
    check_same_types(manifests, ("caption",))
    with pytest.raises(DataError, match=r"second': column 'id' is int32, in .* int64"):
        check_same_types(manifests, ("id",))


def test_folders_that_differ_in_what_may_be_null_are_mixed(folder: Path, tmp_path: Path) -> None:
    strict = pa.schema([pa.field("id", pa.int64(), nullable=False), pa.field("caption", pa.string(), nullable=False)])
    (tmp_path / "second").mkdir()
    pq.write_table(pa.table([[100, 101], ["a", "b"]], schema=strict), tmp_path / "second" / "a.parquet")
    manifests = [scan(str(folder)), scan(str(tmp_path / "second"))]
    check_same_types(manifests, ("id", "caption"))
    table = SliceReader(manifests, ("id", "caption")).read([[(0, 0, 1)], [(0, 0, 2)]])
    assert table.to_pydict() == {"id": [0, 100, 101], "caption": ["picture 0", "a", "b"]}


def test_records_are_known_by_names_sizes_and_rows_wherever_they_are(folder: Path, tmp_path: Path) -> None:
    first = records_identity(scan(str(folder)))
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for path in copy.iterdir():
        os.utime(path, (1, 1))
    assert records_identity(scan(str(copy))) == first
    in_place = [records_identity(scan(str(place)), in_place=True) for place in (folder, folder, copy)]
    assert in_place[0] == in_place[1] != in_place[2]
    (copy / "part-00001.parquet").rename(copy / "part-00002.parquet")
    renamed = records_identity(scan(str(copy)))
    write(copy / "part-00003.parquet", [1])
    added = records_identity(scan(str(copy)))
    (copy / "part-00003.parquet").unlink()
    write(copy / "part-00000.parquet", list(range(10)), row_group_size=5)
    assert len({first, renamed, added, records_identity(scan(str(copy)))}) == 4


def test_records_are_known_by_the_hash_of_their_content(listed: Path) -> None:
    first = records_identity(scan(str(listed)))
    facts = json.loads((listed / "manifest.json").read_text())
    (listed / "manifest.json").write_text(json.dumps(facts | {"clip_fingerprint": "other"}))
    assert records_identity(scan(str(listed))) == first
    (listed / "manifest.json").write_text(json.dumps(facts | {"records_sha256": "abc"}))
    assert records_identity(scan(str(listed))) != first


def test_footers_are_kept_without_what_others_wrote_into_them(tmp_path: Path) -> None:
    table = pa.table({"id": [1]}).replace_schema_metadata({"pandas": "x" * 1000})
    pq.write_table(table, tmp_path / "a.parquet")
    assert scan(str(tmp_path)).schema.metadata is None


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


def test_a_finished_folder_may_be_allowed_to_be_empty(tmp_path: Path) -> None:
    relist(tmp_path, [])
    with pytest.raises(DataError, match=r"holds no \*\.parquet file"):
        scan(str(tmp_path), ("id",))
    manifest = scan(str(tmp_path), ("id",), may_be_empty=True)
    assert (manifest.rows, manifest.facts) == (0, {"clip_fingerprint": "abc"})
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"holds no \*\.parquet file"):
        scan(str(tmp_path), may_be_empty=True)
