"""Files on local disk or object storage under one set of names: the only place that opens a path or `s3://` address.

What cannot be read or written raises `OSError` naming it. `unclip.utils.s3` says what S3 does beyond that.
"""

from __future__ import annotations

import json
import os
import posixpath
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from unclip.utils.hub import HUB_PREFIX

_PROBE = ".unclip-"
PART_LINES = 256
"""Lines in a part of a file that grows on an object store."""


def is_local(uri: str) -> bool:
    """True for plain paths and `file://` addresses."""
    return ("://" not in uri and not uri.startswith(HUB_PREFIX)) or uri.startswith("file://")


def absolute(uri: str) -> str:
    """The address that means the same from any folder; object-store addresses stay as they are."""
    return os.path.abspath(os.path.expanduser(uri.removeprefix("file://"))) if is_local(uri) else uri.rstrip("/")


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of `uri` and the path inside it. It may be used from any thread and remembers no listings."""
    uri = absolute(uri)
    if uri.startswith(HUB_PREFIX):
        raise FileNotFoundError(f"{uri!r}: a repository of a hub is no folder; only whole bundles are read from one")
    if uri.startswith(("s3://", "s3a://")):
        from unclip.utils.s3 import connection  # here, since it takes a second that local runs can do without

        fs = connection()
        return fs, fs._strip_protocol(uri)
    if is_local(uri):
        return fsspec.filesystem("file"), uri  # as it is: `::` in a name chains file systems elsewhere
    fs, path = fsspec.core.url_to_fs(uri)
    return fs, path


def join(uri: str, *parts: str) -> str:
    """`uri/part/…`, also for object-store addresses."""
    return posixpath.join(uri, *parts)


def lies_in(uri: str, folder: str) -> bool:
    """Whether `uri` is the folder or something under it; links on local disk are followed."""
    inner, outer = (os.path.realpath(absolute(path)) if is_local(path) else absolute(path) for path in (uri, folder))
    return f"{inner}/".startswith(outer.rstrip("/") + "/")


def exists(uri: str) -> bool:
    """Whether there is a file or folder; raises `OSError` where that cannot be found out."""
    return _info(uri) is not None


def names(uri: str) -> list[str]:
    """Sorted names directly under a folder; empty where the folder does not exist."""
    fs, path = filesystem(uri)
    try:
        entries = [str(entry).rstrip("/") for entry in fs.ls(path, detail=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    # Some tools mark a folder on an object store by an empty object of its name.
    return sorted(posixpath.basename(entry) for entry in entries if entry != path.rstrip("/"))


def size(uri: str) -> int | None:
    """Bytes of a file; None where there is none."""
    info = _info(uri)
    return int(info["size"]) if info is not None and info["type"] == "file" else None


def sizes(uri: str) -> dict[str, int]:
    """Bytes of every file directly under a folder by its name, by one listing; empty where the folder does not exist."""
    if is_local(uri):  # one at a time: a file may go while others are asked
        return {name: found for name in names(uri) if (found := size(join(uri, name))) is not None}
    fs, path = filesystem(uri)
    try:
        entries = fs.ls(path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {posixpath.basename(entry["name"]): int(entry["size"]) for entry in entries if entry["type"] == "file"}


def _info(uri: str) -> dict[str, Any] | None:
    fs, path = filesystem(uri)
    try:
        info = fs.info(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    assert isinstance(info, dict)
    return info


def make_folder(uri: str) -> None:
    """Creates a folder and its parents; a no-op on object stores, which have none."""
    if is_local(uri):
        Path(absolute(uri)).mkdir(parents=True, exist_ok=True)


def remove(uri: str) -> None:
    """Deletes a file or a whole folder; nothing happens where there is none."""
    fs, path = filesystem(uri)
    with suppress(FileNotFoundError):
        fs.rm(path, recursive=True)


def read_bytes(uri: str) -> bytes:
    fs, path = filesystem(uri)
    content = fs.cat_file(path)
    assert isinstance(content, bytes)
    return content


def read_ranges(uri: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes `start … stop` of a file for each of `ranges`; object stores are asked for all of them at once."""
    fs, path = filesystem(uri)
    starts, stops = ([edge[i] for edge in ranges] for i in (0, 1))
    pieces: list[bytes] = fs.cat_ranges([path] * len(ranges), starts, stops, on_error="raise")
    for (start, stop), piece in zip(ranges, pieces, strict=True):
        if len(piece) != stop - start:
            raise OSError(f"{uri} ends before its byte {stop}")
    return pieces


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
    """Adds one line to a file, whole or not at all. There must be one writer.

    Object stores cannot add to what is there: on them `uri` is a folder of parts, of which the last one is written anew
    with each line until it has `PART_LINES`. So a line is safe when the call returns, and its cost does not grow.
    """
    if is_local(uri):
        path = Path(absolute(uri))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            end = _end_of_lines(file)
            try:
                file.truncate(end)
                file.write(f"{line}\n".encode())
                file.flush()
            except OSError:  # a full disk takes a part of it
                os.truncate(path, end)
                raise
        return
    parts = names(uri)
    lines = _lines(join(uri, parts[-1])) if parts else []
    if parts and len(lines) < PART_LINES:
        number = len(parts) - 1
    else:
        number, lines = len(parts), []
    write_bytes(join(uri, f"{number:08d}"), "".join(f"{text}\n" for text in [*lines, line]).encode())


def _end_of_lines(file: BinaryIO) -> int:
    """Where the last whole line ends: a writer that was killed may have left a part of another behind it."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def read_lines(uri: str) -> list[str]:
    """What `append_line` has added, oldest first; empty where there is nothing."""
    if is_local(uri):
        return _lines(uri) if exists(uri) else []
    return [line for part in names(uri) for line in _lines(join(uri, part))]


def _lines(uri: str) -> list[str]:
    return read_bytes(uri).decode().split("\n")[:-1]


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
    """A local path to write, which becomes `uri` when the block ends without an error: renamed, or uploaded.

    The file is on stable storage then: a machine that loses power right after keeps it, and all written so before.
    """
    fs, path = filesystem(uri)
    if is_local(uri):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = Path(f"{path}.{uuid.uuid4().hex}.tmp")
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync(temporary.parent)
        finally:
            temporary.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory(prefix="unclip-") as folder:
        target = Path(folder) / posixpath.basename(path)
        yield target
        fs.put_file(str(target), path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(uri: str) -> None:
    """Raises `OSError` naming `uri` where a file cannot be made and deleted under it."""
    probe = join(uri, f"{_PROBE}{uuid.uuid4().hex}")
    try:
        write_bytes(probe, b"")
        remove(probe)
    except (OSError, ValueError) as error:
        raise OSError(f"{uri!r} cannot be written: {error}") from error


def is_probe(name: str) -> bool:
    """Whether a file of that name was left by a `check_writable` that was killed."""
    return name.startswith(_PROBE)
