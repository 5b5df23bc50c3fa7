"""Files, local and on an in-memory object store, under the same names."""

from __future__ import annotations

import os

import pytest

from unclip.utils import storage


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path) -> str:
    return str(tmp_path / "root") if request.param == "local" else f"memory://{tmp_path.name}/root"


def test_json_bytes_lines_names_and_removal(root: str) -> None:
    assert storage.names(root) == []
    storage.write_json(storage.join(root, "a", "b.json"), {"x": 1})
    storage.append_line(storage.join(root, "log"), "one")
    storage.append_line(storage.join(root, "log"), "two")
    assert storage.read_json(storage.join(root, "a", "b.json")) == {"x": 1}
    assert storage.read_bytes(storage.join(root, "log")) == b"one\ntwo\n"
    assert storage.names(root) == ["a", "log"]
    assert storage.size(storage.join(root, "log")) == 8
    assert storage.size(storage.join(root, "none")) is None
    storage.remove(storage.join(root, "a"))
    assert not storage.exists(storage.join(root, "a", "b.json"))


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


def test_relative_paths_become_absolute_and_addresses_stay(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/x") == os.path.join(os.getcwd(), "runs/x")
    assert storage.absolute("s3://bucket/x/") == "s3://bucket/x"
