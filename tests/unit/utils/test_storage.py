"""Files, local and on an in-memory object store, under the same names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from unclip.utils import storage


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path) -> str:
    return str(tmp_path / "root") if request.param == "local" else f"memory://{tmp_path.name}/root"


def test_json_bytes_names_and_removal(root: str) -> None:
    assert storage.names(root) == []
    storage.write_json(storage.join(root, "a", "b.json"), {"x": 1})
    storage.write_bytes(storage.join(root, "log"), b"one\ntwo\n")
    assert storage.read_json(storage.join(root, "a", "b.json")) == {"x": 1}
    assert storage.read_bytes(storage.join(root, "log")) == b"one\ntwo\n"
    assert storage.names(root) == ["a", "log"]
    assert storage.size(storage.join(root, "log")) == 8
    assert storage.size(root) is None
    assert storage.size(storage.join(root, "none")) is None
    storage.remove(storage.join(root, "a"))
    assert not storage.exists(storage.join(root, "a", "b.json"))


def test_lines_grow_a_file(root: str) -> None:
    log = storage.join(root, "log")
    assert storage.read_lines(log) == []
    lines = [f"line {number} … \u2028 with a separator that is no newline" for number in range(storage.PART_LINES + 3)]
    for line in lines:
        storage.append_line(log, line)
    assert storage.read_lines(log) == lines
    if storage.is_local(root):
        assert storage.size(log) == sum(len(line.encode()) + 1 for line in lines)
    else:
        assert storage.names(log) == ["00000000", "00000001"]
    storage.remove(log)
    assert not storage.exists(log)


@pytest.mark.parametrize("left_behind", [b"", b'{"step": 2, "lo', b"x" * 5000])
def test_a_line_after_half_a_line_is_whole(tmp_path: Path, left_behind: bytes) -> None:
    """What a writer that was killed in the middle of a line left is neither read nor continued."""
    log = tmp_path / "log.jsonl"
    storage.append_line(str(log), "first")
    log.write_bytes(log.read_bytes() + left_behind)
    assert storage.read_lines(str(log)) == ["first"]
    storage.append_line(str(log), "second")
    assert storage.read_lines(str(log)) == ["first", "second"]


def test_half_a_line_alone_is_none(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"x" * 9000)
    storage.append_line(str(log), "first")
    assert storage.read_lines(str(log)) == ["first"]


def test_what_lies_under_a_file_does_not_exist(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    assert not storage.exists(str(tmp_path / "file" / "under"))
    assert storage.size(str(tmp_path / "file" / "under")) is None


def test_local_copies_and_targets(root: str) -> None:
    uri = storage.join(root, "file.bin")
    with storage.local_target(uri) as path:
        path.write_bytes(b"abc")
    with storage.local_file(uri) as path:
        assert path.read_bytes() == b"abc"


def test_a_failed_write_leaves_nothing(root: str) -> None:
    def write_half() -> None:
        with storage.local_target(storage.join(root, "file.bin")) as path:
            path.write_bytes(b"half")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        write_half()
    assert storage.names(root) == []


def test_unwritable_places_are_named(tmp_path) -> None:
    storage.check_writable(str(tmp_path / "new" / "folder"))
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(OSError, match="file/under"):
        storage.check_writable(str(blocked / "under"))


def test_what_a_killed_check_leaves_is_known_as_such(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(storage, "remove", lambda uri: None)
    storage.check_writable(str(tmp_path))
    (left,) = storage.names(str(tmp_path))
    assert storage.is_probe(left)
    assert not storage.is_probe("data-00000.parquet")


def test_colons_in_names_mean_nothing(tmp_path) -> None:
    storage.write_bytes(f"{tmp_path}/a::b/c::d.png", b"x")
    assert storage.names(str(tmp_path)) == ["a::b"]
    assert storage.read_bytes(f"file://{tmp_path}/a::b/c::d.png") == b"x"


def test_what_lies_in_a_folder(tmp_path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for uri, folder in (("a", "a"), ("a/b", "a"), ("a/b/c", "a/"), ("link/b", "a"), ("a/../a/b", "a"), ("a", "")):
        assert storage.lies_in(f"{tmp_path}/{uri}", f"{tmp_path}/{folder}")
    for uri, folder in (("ab", "a"), ("a", "a/b"), ("a/../b", "a")):
        assert not storage.lies_in(f"{tmp_path}/{uri}", f"{tmp_path}/{folder}")
    assert storage.lies_in(f"file://{tmp_path}/a", "/")
    assert storage.lies_in("s3://bucket/in/out", "s3://bucket/in/")
    assert not storage.lies_in("s3://bucket/in", "s3://bucket/i")
    assert not storage.lies_in("s3://bucket/in", f"{tmp_path}")


def test_relative_paths_become_absolute_and_addresses_stay(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/x") == os.path.join(os.getcwd(), "runs/x")
    assert storage.absolute("s3://bucket/x/") == "s3://bucket/x"
