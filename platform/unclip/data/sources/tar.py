"""Tar archives read front to back, once, holding one member at a time; nothing in them is trusted.

The standard library parses the headers. Its archive class is not used: it reads extended headers of any size into
memory, and takes a damaged header in the middle for the archive's end.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

_BLOCK = 512
_SKIP_BYTES = 1 << 20
_MAX_EXTENDED_BYTES = 1 << 20
_ZERO_BLOCK = bytes(_BLOCK)
_PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")
_SPECIAL = {
    tarfile.LNKTYPE: "is a hard link",
    tarfile.SYMTYPE: "is a symbolic link",
    tarfile.CHRTYPE: "is a device",
    tarfile.BLKTYPE: "is a device",
    tarfile.FIFOTYPE: "is a pipe",
    tarfile.GNUTYPE_SPARSE: "is a sparse file",
}


class ByteStream(Protocol):
    def read(self, size: int) -> bytes:
        """Exactly `size` bytes, fewer only at the end."""
        ...


class BrokenArchive(Exception):
    """The archive cannot be read on from here.

    Args:
        reason: `truncated_shard` where it just ends, `unreadable_shard` where what follows is no tar.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Member:
    """One entry of an archive.

    Args:
        name: as it is written there; bytes that are not UTF-8 are lone surrogates.
        size: bytes of its content.
        is_folder: true for a directory.
        problem: why it is no plain file, ready to follow its name; None for one.
    """

    name: str
    size: int
    is_folder: bool
    problem: str | None


@dataclass
class _Extended:
    """What headers before a member's own say of it."""

    name: str | None = None
    size: int | None = None
    problem: str | None = None


class TarStream:
    """Iterates over the members; `read()` gives the content of the one last yielded, which is skipped otherwise.

    Archives that were joined end to end are read through. Raises `BrokenArchive`.
    """

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._offset = 0
        self._size = 0
        self._unread = 0

    def __iter__(self) -> Iterator[Member]:
        ended = False
        extended = _Extended()
        while block := self._next_block(ended):
            ended = block == _ZERO_BLOCK
            if ended:
                continue
            header = self._parse(block)
            if header.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                self._open(header.size)
                self._extend(extended, header.type)
                continue
            yield self._member(header, extended, block)
            extended = _Extended()

    def read(self) -> bytes:
        """The whole content of the current member: check its size first."""
        content = self._take(self._size)
        self._unread -= self._size
        return content

    def _next_block(self, ended: bool) -> bytes:
        """The block of the next header; empty at the end of the archive."""
        while self._unread:
            self._unread -= len(self._take(min(self._unread, _SKIP_BYTES)))
        block = self._stream.read(_BLOCK)
        if not block and ended:
            return block
        if len(block) < _BLOCK:
            raise BrokenArchive("truncated_shard", f"ends at byte {self._offset + len(block)} without an end mark")
        self._offset += _BLOCK
        return block

    def _parse(self, block: bytes) -> tarfile.TarInfo:
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise BrokenArchive("unreadable_shard", f"no tar header at byte {self._offset - _BLOCK}: {error}") from None
        if header.size < 0:
            raise BrokenArchive("unreadable_shard", f"member of size {header.size} at byte {self._offset - _BLOCK}")
        return header

    def _member(self, header: tarfile.TarInfo, extended: _Extended, block: bytes) -> Member:
        size = header.size if extended.size is None else extended.size
        problem = _SPECIAL.get(header.type) or extended.problem
        if header.type not in tarfile.SUPPORTED_TYPES:
            problem = f"is of the unknown type {header.type!r}"
        if header.type == tarfile.GNUTYPE_SPARSE:
            more = block[482]
            while more:  # maps of the holes, before the content
                more = self._take(_BLOCK)[504]
        has_content = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
        self._open(size if has_content else 0)
        return Member(extended.name or header.name, self._size, header.isdir(), problem)

    def _extend(self, extended: _Extended, kind: bytes) -> None:
        """Takes the content of an extended header, but of what holds for all members or for links."""
        if kind in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            return
        if self._size > _MAX_EXTENDED_BYTES:
            extended.problem = f"has an extended header of {self._size} bytes"
        elif kind == tarfile.GNUTYPE_LONGNAME:
            extended.name = self.read().split(b"\0")[0].decode("utf-8", "surrogateescape")
        else:
            _apply_pax(extended, self.read())

    def _open(self, size: int) -> None:
        self._size = size
        self._unread = -(-size // _BLOCK) * _BLOCK

    def _take(self, size: int) -> bytes:
        content = self._stream.read(size)
        self._offset += len(content)
        if len(content) < size:
            raise BrokenArchive("truncated_shard", f"ends at byte {self._offset}, in the middle of a member")
        return content


def _apply_pax(extended: _Extended, content: bytes) -> None:
    position = 0
    while position < len(content.rstrip(b"\0")):
        match = _PAX_RECORD.match(content, position)
        stop = position + int(match[1]) if match else 0
        if match is None or stop <= match.end() or content[stop - 1 : stop] != b"\n":
            extended.problem = "has a malformed extended header"
            return
        keyword, value = match[2], content[match.end() : stop - 1]
        if keyword == b"path":
            extended.name = value.decode("utf-8", "surrogateescape")
        elif keyword == b"size" and re.fullmatch(rb"\d{1,18}", value):
            extended.size = int(value)
        elif keyword.startswith(b"GNU.sparse."):
            extended.problem = _SPECIAL[tarfile.GNUTYPE_SPARSE]
        position = stop
