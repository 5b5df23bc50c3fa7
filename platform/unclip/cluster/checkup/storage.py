"""The storage, as every node sees it: what our files need of it, how fast it is, and what its errors mean."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from unclip.cluster.checkup.result import Finding, failed, ok, warning
from unclip.utils import storage

TOKEN = "token"  # noqa: S105 the name of a file
SLOW_MB_S = 20.0
"""Below it a node gets fewer than 400 pictures of 50 kB a second."""
_MB = 10**6


@dataclass(frozen=True)
class Rates:
    """MB/s of one file written and read by one node."""

    write_mb_s: float
    read_mb_s: float


@dataclass(frozen=True)
class Trouble:
    """step: what was tried. kind: the error's class, by which advice is given."""

    step: str
    kind: str
    message: str


class _Failed(Exception):
    """A step went wrong."""

    def __init__(self, step: str, error: Exception) -> None:
        self.trouble = Trouble(step, kind_of(error), str(error).splitlines()[0] if str(error) else repr(error))


def use(folder: str, token: str, name: str, megabytes: int) -> Rates | Trouble:
    """Everything that our jobs do with files, in `folder/name`, which is empty again at the end.

    Args:
        folder: where the driver has written `token`, which this node must see.
        name: of this node's own folder.
        megabytes: size of the file that is timed.
    """
    own = storage.join(folder, name)
    try:
        with _step("see what another node wrote"):
            _must_be(storage.read_bytes(storage.join(folder, TOKEN)), token.encode())
        with _step("write"):
            storage.write_bytes(storage.join(own, "file"), b"old")
        with _step("replace"):
            storage.write_bytes(storage.join(own, "file"), b"new")
            _must_be(storage.read_bytes(storage.join(own, "file")), b"new")
        with _step("append"):
            storage.append_line(storage.join(own, "lines"), "one")
            storage.append_line(storage.join(own, "lines"), "two")
            _must_be(storage.read_lines(storage.join(own, "lines")), ["one", "two"])
        rates = _transfer(storage.join(own, "large"), megabytes)
        with _step("list"):
            _must_be(storage.names(own), ["file", "large", "lines"])
        with _step("delete"):
            storage.remove(own)
            _must_be(storage.names(own), [])
    except _Failed as failure:
        return failure.trouble
    return rates


def _transfer(uri: str, megabytes: int) -> Rates:
    """A file of random bytes, as a checkpoint's: uploaded in parts, renamed into place, and read back."""
    content = os.urandom(_MB) * megabytes
    with _step(f"write {megabytes} MB"):
        started = time.perf_counter()
        with storage.local_target(uri) as path:
            path.write_bytes(content)
        written = time.perf_counter()
    with _step(f"read {megabytes} MB"):
        same = storage.read_bytes(uri) == content
        finished = time.perf_counter()
        _must_be(same, True)
        _must_be(storage.read_ranges(uri, [(1, 9), (_MB - 4, _MB)]), [content[1:9], content[_MB - 4 : _MB]])
    return Rates(megabytes / (written - started), megabytes / (finished - written))


def judge_storage(answer: Rates | Trouble, uri: str) -> Finding:
    if isinstance(answer, Trouble):
        return failed(f"cannot {answer.step}: {answer.message}", advice_for(answer, uri))
    found = f"writes {answer.write_mb_s:.0f} MB/s, reads {answer.read_mb_s:.0f} MB/s"
    if min(answer.write_mb_s, answer.read_mb_s) < SLOW_MB_S:
        return warning(found, f"below {SLOW_MB_S:.0f} MB/s a node waits for its data: use a bucket in the same region")
    return ok(f"{found}; replaces, appends, lists and deletes")


def kind_of(error: Exception) -> str:
    """The most telling class of an error."""
    for kind in (PermissionError, FileNotFoundError, ConnectionError, _Differs):
        if isinstance(error, kind):
            return kind.__name__
    return type(error).__name__


def advice_for(trouble: Trouble, uri: str) -> str:
    """What an operator changes."""
    if storage.is_local(uri):
        if trouble.step.startswith("see"):
            return "mount one file system at this path on all nodes, or use an s3:// address"
        return "let the user that Ray runs as write there, on every node"
    if "no credentials" in trouble.message:
        return (
            "give all pods the Secret or the service account with the keys (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
        )
    if trouble.kind == "PermissionError":
        return (
            "check the keys, and allow s3:GetObject, s3:PutObject, s3:DeleteObject, s3:AbortMultipartUpload and "
            "s3:ListBucket"
        )
    if trouble.kind == "FileNotFoundError":
        return "make the bucket, or correct its name, AWS_REGION or AWS_ENDPOINT_URL"
    if trouble.kind == "ConnectionError":
        return "check AWS_ENDPOINT_URL, DNS and what the network lets out (NetworkPolicy egress)"
    if trouble.kind in ("ImportError", "ValueError"):
        return "use a folder or an s3:// address"
    if trouble.kind == _Differs.__name__:
        return "the store must show what was written at once: no cache between, no eventual consistency"
    return "see docs/storage.md for what is asked of a store"


class _Differs(OSError):
    """The store does not say what was written."""


def _must_be(found: object, expected: object) -> None:
    if found != expected:
        raise _Differs(f"found {_short(found)} where {_short(expected)} had been written")


def _short(value: object) -> str:
    return repr(value)[:60]


@contextmanager
def _step(step: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError) as error:  # the last two: of addresses that nothing here can open
        raise _Failed(step, error) from error


def write_token(folder: str, token: str) -> Trouble | None:
    """By the driver, before the nodes look for it."""
    try:
        with _step("write"):
            storage.write_bytes(storage.join(folder, TOKEN), token.encode())
    except _Failed as failure:
        return failure.trouble
    return None
