"""A folder as a source: every file comes out once, as a picture, with one, or with its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest

from unclip.data.manifest import DataError
from unclip.data.sources import FolderSourceConfig


def fill(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def read(uri: Path | str, **settings: Any) -> dict[str, dict[str, Any]]:
    source = FolderSourceConfig(uri=str(uri), **settings).build()
    tables = [table for part in source.parts() for table in source.read(part)]
    assert all(table.schema == source.schema() for table in tables)
    rows = [row for table in tables for row in table.to_pylist()]
    assert len({row["key"] for row in rows}) == len(rows)
    assert [row["key"] for row in rows] == sorted(row["key"] for row in rows)
    return {row["key"]: row for row in rows}


def test_captions_beside_the_pictures(tmp_path: Path) -> None:
    rows = read(
        fill(tmp_path, {"a.jpg": b"1", "a.txt": "an é", "d/b.v2.PNG": b"2", "d/b.v2.txt": "\ufeffb", "c.webp": b"3"})
    )
    assert {key: (row["image"], row["caption"], row["reason"]) for key, row in rows.items()} == {
        "a.jpg": (b"1", "an é", None),
        "d/b.v2.PNG": (b"2", "b", None),
        "c.webp": (b"3", None, None),
    }


@pytest.mark.parametrize("form", ["jsonl", "csv"])
@pytest.mark.parametrize(("stem", "field"), [("captions", "caption"), ("metadata", "text")])
def test_captions_in_a_list(tmp_path: Path, stem: str, field: str, form: str) -> None:
    records = [("a.jpg", "a, b", 1), ("sub/b.jpg", 'say "é"\nnow', 2)]
    if form == "jsonl":
        text = "\n\n".join(json.dumps({"file_name": name, field: caption, "n": n}) for name, caption, n in records)
    else:
        text = f'n,file_name,{field}\r\n1,a.jpg,"a, b"\r\n2,sub/b.jpg,"say ""é""\nnow"\r\n'
    fill(tmp_path, {f"d/{stem}.{form}": text, "d/a.jpg": b"1", "d/sub/b.jpg": b"2", "d/c.jpg": b"3"})
    rows = read(tmp_path, fields={"n": "int64"})
    assert [(row["caption"], row["n"]) for row in rows.values()] == [("a, b", 1), (None, None), ('say "é"\nnow', 2)]
    assert json.loads(rows["d/a.jpg"]["metadata"]) == {"n": 1 if form == "jsonl" else "1"}


def test_text_beside_the_picture_comes_before_the_list(tmp_path: Path) -> None:
    rows = read(
        fill(tmp_path, {"a.jpg": b"1", "a.txt": "beside", "captions.csv": "file_name,caption,n\na.jpg,listed,5\n"})
    )
    assert (rows["a.jpg"]["caption"], rows["a.jpg"]["metadata"]) == ("beside", '{"n":"5"}')


def test_everything_else_has_its_reason(tmp_path: Path) -> None:
    lines = [
        b'{"file_name": "a.jpg", "text": "fine"}',
        b'{"file_name": "a.jpg", "text": "again"}',
        b'{"file_name": "gone.jpg", "text": "x"}',
        b'{"file_name": "../a.jpg", "text": "x"}',
        b'{"file_name": "/etc/a.jpg", "text": "x"}',
        b'{"text": "x"}',
        b"{not json",
        b"[1]",
        b"[" * 5000,
        b'{"file_name": "b.jpg", "text": "\xff"}',
        b'{"file_name": "c.jpg", "text": 5}',
        b'{"file_name": "d.jpg", "text": "\\udc00"}',
    ]
    fill(tmp_path, {f"{name}.jpg": b"x" for name in "abcd"} | {"metadata.jsonl": b"\n".join(lines)})
    fill(
        tmp_path,
        {"e.jpg": b"x", "e.txt": b"\xff", "f.jpg": bytes(101), "lone.txt": "x", "notes.pdf": "x", ".hidden": "x"},
    )
    rows = read(tmp_path, max_file_bytes=100)
    assert {key: row["reason"] for key, row in rows.items()} == {
        "a.jpg": None,
        "metadata.jsonl:1": "repeated_key",
        "metadata.jsonl:2": "no_image",
        "metadata.jsonl:3": "bad_file_name",
        "metadata.jsonl:4": "bad_file_name",
        "metadata.jsonl:5": "bad_row",
        "metadata.jsonl:6": "bad_row",
        "metadata.jsonl:7": "bad_row",
        "metadata.jsonl:8": "bad_row",
        "b.jpg": "invalid_utf8",
        "c.jpg": "bad_row",
        "d.jpg": "invalid_utf8",
        "e.jpg": "invalid_utf8",
        "f.jpg": "too_large",
        "lone.txt": "no_image",
        "notes.pdf": "unknown_file",
    }
    assert rows["a.jpg"]["caption"] == "fine"
    assert all(row["detail"] for row in rows.values() if row["reason"] is not None)


def test_ragged_and_huge_csv_rows(tmp_path: Path) -> None:
    text = "file_name,caption\na.jpg,one,two\nb.jpg\nc.jpg," + "x" * 200_000 + "\nd.jpg,fine\n"
    rows = read(fill(tmp_path, {"captions.csv": text, **{f"{name}.jpg": b"x" for name in "abcd"}}))
    assert [key for key, row in rows.items() if row["reason"] == "bad_row"] == [f"captions.csv:{n}" for n in range(3)]
    assert rows["d.jpg"]["caption"] == "fine"


def test_parts_are_fixed_numbers_of_rows(tmp_path: Path) -> None:
    fill(tmp_path, {f"{n:03d}.jpg": b"%d" % n for n in range(100)})
    source = FolderSourceConfig(uri=str(tmp_path), files_per_part=40).build()
    assert [part.name for part in source.parts()] == ["000000000", "000000040", "000000080"]
    rows = [[row["image"] for table in source.read(part) for row in table.to_pylist()] for part in source.parts()]
    assert [len(part) for part in rows] == [40, 40, 20]
    assert [image for part in rows for image in part] == [b"%d" % n for n in range(100)]


def test_name_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a\udcff.jpg").write_bytes(b"x")
    assert [(row["key"], row["image"]) for row in read(tmp_path).values()] == [("a\\udcff.jpg", b"x")]
    fill(tmp_path, {"b\udcff/captions.jsonl": '{"file_name": "c.jpg", "caption": 5}', "b\udcff/c.jpg": b"y"})
    assert read(tmp_path)["b\\udcff/c.jpg"]["detail"] == "b\\udcff/captions.jsonl:0: the caption is no text"


def test_links_to_files_are_followed_and_those_to_folders_refused(tmp_path: Path) -> None:
    fill(tmp_path, {"elsewhere/1.jpg": b"one", "elsewhere/1.txt": "a caption", "in/2.jpg": b"two"})
    for name in ("1.jpg", "1.txt"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "elsewhere" / name)
    rows = read(tmp_path / "in")
    assert [(key, row["image"], row["caption"]) for key, row in rows.items()] == [
        ("1.jpg", b"one", "a caption"),
        ("2.jpg", b"two", None),
    ]
    (tmp_path / "in" / "more").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"in/more' is neither file nor folder"):
        read(tmp_path / "in")


def test_names_with_colons_and_brackets(tmp_path: Path) -> None:
    names = ["a::b.png", "c [v2].png", "what?.png"]
    rows = read(fill(tmp_path / "set [v2]", {name: name for name in names}))
    assert {key: row["image"].decode() for key, row in rows.items()} == {name: name for name in names}


def test_object_store(tmp_path: Path) -> None:
    fill(tmp_path, {"a.jpg": b"1", "a.txt": "one", "d/b.jpg": b"2", "d/captions.csv": "file_name,caption\nb.jpg,two\n"})
    fsspec.filesystem("memory").put(str(tmp_path), "/bucket/tree", recursive=True)
    assert read("memory://bucket/tree") == read(tmp_path)
    assert read(tmp_path)["d/b.jpg"]["caption"] == "two"


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere' does not exist"):
        read(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no files"):
        read(fill(tmp_path, {".hidden": "x"}))
