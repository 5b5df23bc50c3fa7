"""All that is known of files and batches: a folder that every process reads, local or on an object store.

Each file in it is written once, or again and again by one writer, and is there whole or not at all. So nobody overwrites
what another wrote, and how far a batch is follows from which of its files are there:

    FOLDER/files/ID/content.jsonl, file.json      file.json comes last, and goes first
    FOLDER/batches/ID/batch.json                  what was asked for, by the process that took the request
    FOLDER/batches/ID/checking.json               who looks through the list, while somebody does
    FOLDER/batches/ID/prompts.jsonl, refused.jsonl, checked.json    the lines that can be done, those that cannot, the sum
    FOLDER/batches/ID/cancelled.json              somebody wants it to end
    FOLDER/batches/ID/pictures/                   the bulk job's, until the answers are written
    FOLDER/batches/ID/progress.json, ended.json   by the one who works it off
    FOLDER/batches/ID/images/                     pictures that are answered by their address
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, TypeVar

from pydantic import Field

from unclip.config.base import Config
from unclip.generation.bulk.config import GenerateConfig
from unclip.serving.batches.objects import (
    BatchObject,
    BatchStatus,
    FileObject,
    ListError,
    ListErrors,
    Purpose,
    RequestCounts,
)
from unclip.serving.errors import TooLarge
from unclip.utils import storage

Ending = Literal["completed", "cancelled", "expired", "failed"]
StoredT = TypeVar("StoredT", bound=Config)

_ID = re.compile(r"(file|batch)-[0-9a-f]{48}(-output|-errors)?")
_BLOCK = 1 << 20
_THREADS = 16


class StoredFile(Config):
    """The content of file.json."""

    id: str
    """Name in the API."""
    filename: str
    """As it was uploaded."""
    bytes: int = Field(ge=0)
    """Size."""
    created_at: int
    """Unix time in seconds."""
    purpose: Purpose
    """What it is for."""
    key_id: str | None
    """Whose it is; null where the server asked for no keys."""

    @property
    def shown(self) -> FileObject:
        """For clients."""
        return FileObject(**self.model_dump(exclude={"key_id"}))


class StoredBatch(Config):
    """The content of batch.json."""

    id: str
    """Name in the API."""
    input_file_id: str
    """The list."""
    created_at: int
    """Unix time in seconds."""
    expires_at: int
    """When it is given up."""
    key_id: str | None
    """Whose it is; null where the server asked for no keys."""
    metadata: dict[str, str] | None
    """The client's own."""
    model: str
    """The model's name in the API."""
    attribution: str
    """What the licences of its training data want said."""
    job: GenerateConfig
    """What the bulk job is asked for. It stays, whatever the server's settings become."""


class Checked(Config):
    """The content of checked.json: the list was looked through."""

    at: int
    """Unix time in seconds."""
    total: int = Field(0, ge=0)
    """Lines."""
    refused: int = Field(0, ge=0)
    """Of these, how many ask for what cannot be done."""
    errors: tuple[ListError, ...] = ()
    """Why the whole list is refused."""


class Cancelled(Config):
    """The content of cancelled.json."""

    at: int
    """Unix time in seconds."""


class Progress(Config):
    """The content of progress.json."""

    completed: int = Field(0, ge=0)
    """Lines that have their pictures."""
    failed: int = Field(0, ge=0)
    """Lines that will have none, those that were refused at once among them."""
    finalizing_at: int | None = None
    """Unix time in seconds since which answers are written."""


class Ended(Config):
    """The content of ended.json: nothing changes any more."""

    at: int
    """Unix time in seconds."""
    status: Ending
    """How it ended."""
    completed: int = Field(ge=0)
    """Lines with pictures."""
    failed: int = Field(ge=0)
    """Lines without."""
    finalizing_at: int
    """Unix time in seconds since which the answers were written."""
    output_file_id: str | None = None
    """Answers."""
    error_file_id: str | None = None
    """Lines without pictures."""
    error: str | None = None
    """Why it could not be done."""


@dataclass(frozen=True)
class BatchState:
    """A batch as its files say."""

    batch: StoredBatch
    checked: Checked | None
    cancelled: Cancelled | None
    progress: Progress | None
    ended: Ended | None

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to be done."""
        return self.ended is not None or (self.checked is not None and bool(self.checked.errors))

    @property
    def rows(self) -> int:
        """Lines that the bulk job is given."""
        return 0 if self.checked is None else self.checked.total - self.checked.refused

    @property
    def reason_to_end(self) -> Literal["cancelled", "expired"] | None:
        """Why no more pictures shall be made."""
        if self.cancelled is not None:
            return "cancelled"
        return "expired" if time.time() > self.batch.expires_at else None

    @property
    def status(self) -> BatchStatus:
        """In OpenAI's words."""
        if self.ended is not None:
            return self.ended.status
        if self.checked is not None and self.checked.errors:
            return "failed"
        if self.cancelled is not None:
            return "cancelling"
        if self.checked is None:
            return "validating"
        return "finalizing" if self.progress is not None and self.progress.finalizing_at else "in_progress"

    @property
    def shown(self) -> BatchObject:
        """For clients."""
        batch, status = self.batch, self.status
        return BatchObject(
            id=batch.id,
            errors=self._errors,
            input_file_id=batch.input_file_id,
            model=batch.model,
            status=status,
            output_file_id=self.ended.output_file_id if self.ended else None,
            error_file_id=self.ended.error_file_id if self.ended else None,
            created_at=batch.created_at,
            in_progress_at=self.checked.at if self.checked and not self.checked.errors else None,
            expires_at=batch.expires_at,
            finalizing_at=(self.ended or self.progress or Progress()).finalizing_at,
            completed_at=self._ended_at("completed"),
            failed_at=self._ended_at("failed"),
            expired_at=self._ended_at("expired"),
            cancelling_at=self.cancelled.at if self.cancelled else None,
            cancelled_at=self._ended_at("cancelled"),
            request_counts=self._counts,
            metadata=batch.metadata,
        )

    @property
    def _errors(self) -> ListErrors | None:
        if self.checked is not None and self.checked.errors:
            return ListErrors(data=self.checked.errors)
        if self.ended is not None and self.ended.error is not None:
            return ListErrors(data=(ListError(code="server_error", message=self.ended.error),))
        return None

    @property
    def _counts(self) -> RequestCounts:
        checked = self.checked or Checked(at=0)
        known = self.ended or self.progress or Progress(failed=checked.refused)
        return RequestCounts(total=checked.total, completed=known.completed, failed=known.failed)

    def _ended_at(self, status: Ending) -> int | None:
        if self.status != status:
            return None
        return self.ended.at if self.ended is not None else self.checked.at if self.checked is not None else None


class BatchFolder:
    """Files and batches at `uri`, an absolute address. Picklable; its methods raise `OSError` where the storage fails."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    # --- files --------------------------------------------------------------------------------------------------------

    def content_uri(self, file_id: str) -> str:
        """Where a file's content is."""
        return storage.join(self.uri, "files", file_id, "content.jsonl")

    def take_file(self, source: BinaryIO, filename: str, *, key_id: str | None, max_bytes: int) -> StoredFile:
        """Stores an upload; raises `TooLarge`."""
        file_id, size = _new_id("file"), 0
        with storage.local_target(self.content_uri(file_id)) as path, path.open("wb") as target:
            while block := source.read(_BLOCK):
                size += len(block)
                if size > max_bytes:
                    raise TooLarge(f"file: larger than {max_bytes} bytes", param="file")
                target.write(block)
        return self.add_file(file_id, filename, size=size, purpose="batch", key_id=key_id)

    def add_file(self, file_id: str, filename: str, *, size: int, purpose: Purpose, key_id: str | None) -> StoredFile:
        """Makes a file known whose content is there."""
        file = StoredFile(id=file_id, filename=filename, bytes=size, created_at=_now(), purpose=purpose, key_id=key_id)
        self._write("files", file_id, "file.json", file)
        return file

    def file(self, file_id: str) -> StoredFile | None:
        """None where there is none of that name."""
        return self._read(StoredFile, "files", file_id, "file.json")

    def delete_file(self, file_id: str) -> None:
        """Takes a file away."""
        storage.remove(self._uri("files", file_id, "file.json"))
        storage.remove(self._uri("files", file_id))

    def files(self, *, newest_first: bool, after: str | None) -> Iterator[StoredFile]:
        """All that come after the one of that name."""
        found = self._after("files", newest_first=newest_first, after=after)
        for block in _blocks(found):
            with ThreadPoolExecutor(_THREADS) as threads:
                yield from (file for file in threads.map(self.file, block) if file is not None)

    # --- batches ------------------------------------------------------------------------------------------------------

    def batch_uri(self, batch_id: str, name: str) -> str:
        """Where something of a batch is."""
        return storage.join(self.uri, "batches", batch_id, name)

    def new_batch_id(self) -> str:
        """Which sorts behind all others."""
        return _new_id("batch")

    def batch_ids(self) -> list[str]:
        """Of all batches, the oldest first."""
        return [name for name in storage.names(storage.join(self.uri, "batches")) if _ID.fullmatch(name)]

    def state(self, batch_id: str) -> BatchState | None:
        """None where there is no such batch."""
        batch = self._read(StoredBatch, "batches", batch_id, "batch.json")
        if batch is None:
            return None
        ended = self._read(Ended, "batches", batch_id, "ended.json")
        return BatchState(
            batch=batch,
            checked=self._read(Checked, "batches", batch_id, "checked.json"),
            cancelled=self._read(Cancelled, "batches", batch_id, "cancelled.json"),
            progress=None if ended else self._read(Progress, "batches", batch_id, "progress.json"),
            ended=ended,
        )

    def states(self, *, newest_first: bool = False, after: str | None = None) -> Iterator[BatchState]:
        """Of all batches that come after the one of that name."""
        for block in _blocks(self._after("batches", newest_first=newest_first, after=after)):
            with ThreadPoolExecutor(_THREADS) as threads:
                yield from (state for state in threads.map(self.state, block) if state is not None)

    def write(self, batch_id: str, value: StoredBatch | Checked | Cancelled | Progress | Ended) -> None:
        """Says something of a batch."""
        names: dict[type[Config], str] = {
            StoredBatch: "batch.json",
            Checked: "checked.json",
            Cancelled: "cancelled.json",
            Progress: "progress.json",
            Ended: "ended.json",
        }
        self._write("batches", batch_id, names[type(value)], value)

    # --- the files themselves -----------------------------------------------------------------------------------------

    def _uri(self, kind: str, name: str, *inner: str) -> str:
        return storage.join(self.uri, kind, name, *inner)

    def _write(self, kind: str, name: str, file: str, value: Config) -> None:
        storage.write_json(self._uri(kind, name, file), value.to_dict())

    def _read(self, into: type[StoredT], kind: str, name: str, file: str) -> StoredT | None:
        if not _ID.fullmatch(name):  # whatever a client wrote there
            return None
        try:
            content: Any = storage.read_json(self._uri(kind, name, file))
        except FileNotFoundError:
            return None
        return into.from_dict(content)

    def _after(self, kind: str, *, newest_first: bool, after: str | None) -> list[str]:
        """Ids begin with the time, so that names in their order are in the order of time."""
        names = sorted(storage.names(storage.join(self.uri, kind)), reverse=newest_first)
        if after is None:
            return names
        return [name for name in names if (name < after if newest_first else name > after)]


def output_ids(batch_id: str) -> tuple[str, str]:
    """Of the files with answers and with errors: the same however often they are written."""
    stem = batch_id.replace("batch-", "file-")
    return f"{stem}-output", f"{stem}-errors"


def _blocks(names: list[str]) -> Iterator[list[str]]:
    """Few at a time: mostly the first are all that is wanted."""
    for start in range(0, len(names), 2 * _THREADS):
        yield names[start : start + 2 * _THREADS]


def _new_id(kind: str) -> str:
    return f"{kind}-{time.time_ns():016x}{secrets.token_hex(16)}"


def _now() -> int:
    return int(time.time())
