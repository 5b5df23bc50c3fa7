"""Files on local disk or object storage under one set of names: the only place that opens a path or `s3://` address.

Credentials, region and endpoint come from the environment (`AWS_ENDPOINT_URL` for a custom one), as s3fs reads them.
"""

from __future__ import annotations

import json
import os
import posixpath
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec


def is_local(uri: str) -> bool:
    """True for plain paths and `file://` addresses."""
    return "://" not in uri or uri.startswith("file://")


def absolute(uri: str) -> str:
    """The address that means the same from any folder; object-store addresses stay as they are."""
    return os.path.abspath(os.path.expanduser(uri.removeprefix("file://"))) if is_local(uri) else uri.rstrip("/")


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of `uri` and the path inside it."""
    fs, path = fsspec.core.url_to_fs(absolute(uri))
    return fs, path


def join(uri: str, *parts: str) -> str:
    """`uri/part/…`, also for object-store addresses."""
    return posixpath.join(uri, *parts)


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    return bool(fs.exists(path))


def names(uri: str) -> list[str]:
    """Sorted names directly under a folder; empty where the folder does not exist."""
    fs, path = filesystem(uri)
    fs.invalidate_cache()
    if not fs.exists(path):
        return []
    return sorted(posixpath.basename(str(entry).rstrip("/")) for entry in fs.ls(path, detail=False))


def size(uri: str) -> int | None:
    """Bytes of a file; None where there is none."""
    fs, path = filesystem(uri)
    fs.invalidate_cache()
    return int(fs.size(path)) if fs.isfile(path) else None


def make_folder(uri: str) -> None:
    """Creates a folder and its parents; a no-op on object stores, which have none."""
    if is_local(uri):
        Path(absolute(uri)).mkdir(parents=True, exist_ok=True)


def remove(uri: str) -> None:
    """Deletes a file or a whole folder; nothing happens where there is none."""
    fs, path = filesystem(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def read_bytes(uri: str) -> bytes:
    fs, path = filesystem(uri)
    content = fs.cat_file(path)
    assert isinstance(content, bytes)
    return content


def write_bytes(uri: str, content: bytes) -> None:
    """Writes a file so that readers see the old content or the new one, never a part."""
    fs, path = filesystem(uri)
    if not is_local(uri):
        fs.pipe_file(path, content)  # one PUT is atomic on object stores
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def read_json(uri: str) -> Any:
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    """Atomic, indented, with a newline at the end."""
    write_bytes(uri, (json.dumps(value, indent=2) + "\n").encode())


def append_line(uri: str, line: str) -> None:
    """Adds one line to a file; object stores rewrite the whole file, so keep those short."""
    if is_local(uri):
        path = Path(absolute(uri))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        return
    before = read_bytes(uri) if exists(uri) else b""
    write_bytes(uri, before + line.encode() + b"\n")


@contextmanager
def local_file(uri: str) -> Iterator[Path]:
    """A local path with the content of `uri`: the file itself where it is local, else a temporary copy."""
    fs, path = filesystem(uri)
    if is_local(uri):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="unclip-") as folder:
        target = Path(folder) / posixpath.basename(path)
        fs.get_file(path, str(target))
        yield target


@contextmanager
def local_target(uri: str) -> Iterator[Path]:
    """A local path to write, which becomes `uri` when the block ends without an error: renamed, or uploaded."""
    fs, path = filesystem(uri)
    if is_local(uri):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = Path(f"{path}.{uuid.uuid4().hex}.tmp")
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory(prefix="unclip-") as folder:
        target = Path(folder) / posixpath.basename(path)
        yield target
        fs.put_file(str(target), path)


def check_writable(uri: str) -> None:
    """Raises `OSError` naming `uri` where a file cannot be made and deleted under it."""
    probe = join(uri, f".unclip-{uuid.uuid4().hex}")
    try:
        write_bytes(probe, b"")
        remove(probe)
    except Exception as error:  # every back end has errors of its own
        raise OSError(f"{uri!r} cannot be written: {error}") from error
