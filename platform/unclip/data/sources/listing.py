"""Which files a source's address means."""

from __future__ import annotations

import posixpath
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from unclip.data.manifest import DataError
from unclip.data.sources.base import is_utf8
from unclip.utils import storage


@dataclass(frozen=True)
class SourceFile:
    """A file of a source.

    Args:
        name: path under the source's folder, with `/`; the file's own name where the source is one file.
        uri: its address.
        size: bytes.
    """

    name: str
    uri: str
    size: int


def find_shards(uri: str, suffixes: Collection[str]) -> tuple[SourceFile, ...]:
    """The files that `uri` means, sorted by name: itself, those a glob matches, or those directly in a folder.

    Of a folder or glob only files count that end in one of `suffixes` and do not start with `.` or `_`.
    Raises `DataError` where there is none, or where a name is not UTF-8, as the names of parts have to be.
    """
    fs, path = storage.filesystem(uri)
    if fs.isfile(path):  # first of all, and folders next: names may be `set [v2]`, as no glob
        return tuple(_files(fs, posixpath.dirname(path), [fs.info(path)]))
    if fs.isdir(path):
        folder, found = path, fs.ls(path, detail=True)
    elif "*" in path or "?" in path or "[" in path:
        folder = path[: min(path.index(mark) for mark in "*?[" if mark in path)].rpartition("/")[0]
        found = fs.glob(path, detail=True).values()
    else:
        raise DataError(f"source {uri!r} does not exist")
    shards = tuple(
        file
        for file in _files(fs, folder, found)
        if file.name.lower().endswith(tuple(suffixes)) and posixpath.basename(file.name)[0] not in "._"
    )
    if not shards:
        raise DataError(f"source {uri!r} holds no file that ends in {' or '.join(suffixes)}")
    for shard in shards:
        if not is_utf8(shard.name):
            raise DataError(f"source {uri!r}: the name {shard.name!r} is not UTF-8; rename it")
    return shards


def find_tree(uri: str) -> tuple[SourceFile, ...]:
    """Every file of a folder and those below it, sorted by name, but hidden ones. `DataError` where there is none."""
    fs, path = storage.filesystem(uri)
    if not fs.isdir(path):
        raise DataError(f"source folder {uri!r} does not exist")
    found = fs.find(path, detail=True).values()
    for entry in found:
        if entry["type"] != "file" and not fs.isfile(entry["name"]):
            raise DataError(
                f"{entry['name']!r} is neither file nor folder, but perhaps a link to a folder: take it away"
            )
    files = _files(fs, path, found)
    visible = tuple(file for file in files if not any(part.startswith(".") for part in file.name.split("/")))
    if not visible:
        raise DataError(f"source folder {uri!r} holds no files")
    return visible


def _files(fs: Any, folder: str, found: Iterable[Mapping[str, Any]]) -> list[SourceFile]:
    files = (
        SourceFile(posixpath.relpath(entry["name"], folder), fs.unstrip_protocol(entry["name"]), int(entry["size"]))
        for entry in found
        if entry["type"] == "file" or (entry.get("islink") and fs.isfile(entry["name"]))
    )
    return sorted(files, key=lambda file: file.name)
