"""Lists of requests: taken in, looked through, handed to whoever works them off, and answered.

Everything is on storage, so that any process answers and none is missed. Every process looks now and then for what nobody
is at: lists that one which is gone has begun to look through, and batches that wait for their turn or have lost their worker.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from contextvars import copy_context
from itertools import islice
from typing import Any, BinaryIO, Literal, Protocol, TypeVar

from unclip.config.base import ConfigError
from unclip.generation.bulk.config import GenerateConfig
from unclip.pipelines.bundle import BundleError
from unclip.serving import context
from unclip.serving.batches.folder import BatchFolder, BatchState, Cancelled, Checked, StoredBatch, StoredFile
from unclip.serving.batches.lines import LineReader, check_list, divide_list
from unclip.serving.batches.objects import (
    BatchList,
    BatchObject,
    BatchRequest,
    FileDeleted,
    FileList,
    FileObject,
    ListError,
)
from unclip.serving.config import ServeConfig
from unclip.serving.errors import ApiError, ContentRefused, InvalidRequest, NotFound
from unclip.serving.guards.policy import Policy
from unclip.serving.observe import logs
from unclip.serving.stages.model import Model, Models
from unclip.utils import storage

WINDOW_S = 24 * 3600
"""Time that a batch has."""
LOOK_S = 5.0
_BEAT_S = 5.0
_SILENT_S = 30.0
"""Time without a sign after which one who looks through a list counts as gone."""
_PROMPTS_AT_ONCE = 16
_LINES_PER_UNIT = 32
"""Lines that are made, and after an interruption made again, together; a batch's counts go up by so many."""
_MAX_FILENAME = 255
_READ_BYTES = 1 << 20
T = TypeVar("T")


class BatchRunner(Protocol):
    """Has batches worked off, outside of this process."""

    def start(self, batch_id: str) -> None:
        """Sees to it that somebody runs `BatchWork` for a batch, whose list was looked through; returns at once."""
        ...


class _Stopped(Exception):
    """This process ends, or another has looked through the list."""


class Batches:
    """The files and batches of a server; methods raise `ApiError` as the API has it, and `OSError` where the storage fails.

    They belong to the key that made them: for others there is nothing of that name.

    Args:
        config: `batches.folder` is given, and all processes reach it.
        models: what new batches are drawn with.
        policy: looks at prompts. Pictures are made where it cannot see them, so that none are made where it wants to.

    Raises `ConfigError` where no folder is given.
    """

    def __init__(self, config: ServeConfig, runner: BatchRunner, *, models: Models, policy: Policy) -> None:
        if config.batches.folder is None:
            raise ConfigError("batches.folder: required for batches, but not given")
        self.folder = BatchFolder(storage.absolute(config.batches.folder))
        self._config, self._runner = config, runner
        self._models, self._policy = models, policy
        self._name = secrets.token_hex(8)
        self._checking: dict[str, asyncio.Task[None]] = {}
        self._silent: dict[str, tuple[Any, float]] = {}
        self._over: set[str] = set()
        self._stop = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="unclip-lists")  # lists are long: one at a time

    # --- files --------------------------------------------------------------------------------------------------------

    def add_file(self, source: BinaryIO, filename: str) -> FileObject:
        """Takes a list in; raises `TooLarge`."""
        name = "".join(letter for letter in filename if letter.isprintable())[-_MAX_FILENAME:] or "list.jsonl"
        key_id, most = context.current().key_id, self._config.batches.max_bytes
        return self.folder.take_file(source, name, key_id=key_id, max_bytes=most).shown

    def file(self, file_id: str) -> FileObject:
        """Raises `NotFound`."""
        return self._file(file_id).shown

    def files(self, *, after: str | None, limit: int, order: Literal["asc", "desc"], purpose: str | None) -> FileList:
        """A page of files."""
        found = self.folder.files(newest_first=order == "desc", after=after)
        wanted = (file.shown for file in found if self._is_ours(file) and purpose in (None, file.purpose))
        page, has_more = _page(wanted, limit)
        return FileList(data=tuple(page), **_ends(page), has_more=has_more)

    def content(self, file_id: str) -> tuple[int, Iterator[bytes]]:
        """How many bytes a file has, and these piece by piece. Raises `NotFound`."""
        self._file(file_id)
        uri = self.folder.content_uri(file_id)
        size = storage.size(uri)
        if size is None:
            raise _no_file(file_id)
        starts = range(0, size, _READ_BYTES)
        return size, (storage.read_ranges(uri, [(start, min(start + _READ_BYTES, size))])[0] for start in starts)

    def delete_file(self, file_id: str) -> FileDeleted:
        """Raises `NotFound`. A list that was looked through is not needed by its batch any more."""
        self._file(file_id)
        self.folder.delete_file(file_id)
        return FileDeleted(id=file_id)

    # --- batches ------------------------------------------------------------------------------------------------------

    async def create(self, request: BatchRequest) -> BatchObject:
        """Has a list worked off; raises `InvalidRequest` and `NotFound`."""
        state = await asyncio.to_thread(self._create, request)
        self._begin_check(state.batch)
        return state.shown

    def batch(self, batch_id: str) -> BatchObject:
        """Raises `NotFound`."""
        return self._state(batch_id).shown

    def batches(self, *, after: str | None, limit: int) -> BatchList:
        """A page of batches, the newest first."""
        states = self.folder.states(newest_first=True, after=after)
        page, has_more = _page((state.shown for state in states if self._is_ours(state.batch)), limit)
        return BatchList(data=tuple(page), **_ends(page), has_more=has_more)

    def cancel(self, batch_id: str) -> BatchObject:
        """Asks a batch to end with what is done; raises `NotFound`, and `InvalidRequest` where it has ended otherwise."""
        state = self._state(batch_id)
        if state.is_over and state.status != "cancelled":
            raise InvalidRequest(f"batch {batch_id!r} is {state.status}: it cannot be cancelled any more")
        if state.cancelled is None:
            self.folder.write(batch_id, Cancelled(at=int(time.time())))
            logs.event("batch_cancelled", batch=batch_id)
        return self.batch(batch_id)

    def _create(self, request: BatchRequest) -> BatchState:
        if self._policy.checks_pictures:
            message = "this server's content policy looks at every picture, which it cannot in batches: there are none"
            raise InvalidRequest(message, code="batches_unavailable")
        file = self._file(request.input_file_id)
        if file.purpose != "batch":
            message = f"input_file_id = {file.id!r}: was not uploaded with purpose batch"
            raise InvalidRequest(message, code="invalid_value", param="input_file_id")
        batch_id, now, model = self.folder.new_batch_id(), int(time.time()), self._models.current
        batch = StoredBatch(
            id=batch_id,
            input_file_id=file.id,
            created_at=now,
            expires_at=now + WINDOW_S,
            key_id=context.current().key_id,
            metadata=request.metadata,
            model=self._config.model,
            attribution=model.attribution,
            job=self._job(batch_id, model),
        )
        self._beat(batch_id)
        self.folder.write(batch_id, batch)
        logs.event("batch_created", batch=batch_id)
        return BatchState(batch, None, None, None, None)

    def _job(self, batch_id: str, model: Model) -> GenerateConfig:
        config = self._config
        return GenerateConfig(
            bundle=model.bundle.uri,
            prompts=self.folder.batch_uri(batch_id, "prompts.jsonl"),
            out=self.folder.batch_uri(batch_id, "pictures"),
            format="parquet",
            options=config.options,
            engine=config.engine,
            device=config.device,
            precision=config.precision,
            prompts_per_shard=_LINES_PER_UNIT,
            actors=config.batches.actors,
            gpus_per_actor=config.batches.gpus_per_actor,
        )

    # --- looking after them -------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Looks after all batches while the block runs; `create` is for inside of it."""
        looking = asyncio.create_task(self._keep_looking())
        try:
            yield
        finally:
            self._stop.set()
            looking.cancel()
            await asyncio.gather(looking, *self._checking.values(), return_exceptions=True)
            self._thread.shutdown()

    async def look(self) -> None:
        """Takes up what nobody is at."""
        states = [state for state in await asyncio.to_thread(self._open_states) if not state.is_over]
        for state in states:
            if state.checked is None and await asyncio.to_thread(self._is_left_alone, state.batch.id):
                self._begin_check(state.batch)
        await asyncio.to_thread(self._start_due, states)

    async def _keep_looking(self) -> None:
        while True:
            try:
                await self.look()
            except Exception as error:  # of the storage, or of the cluster: both come back
                logs.event("batches_look_failed", level=logging.ERROR, error=error)
            await asyncio.sleep(LOOK_S)

    def _open_states(self) -> list[BatchState]:
        """Of the batches that have not ended, the oldest first; what has ended is read once."""
        found = []
        for batch_id in self.folder.batch_ids():
            state = None if batch_id in self._over else self.folder.state(batch_id)
            if state is not None and state.is_over:
                self._over.add(batch_id)
            elif state is not None:
                found.append(state)
        return found

    def _start_due(self, states: Sequence[BatchState]) -> None:
        """The oldest ones; those that only have to be ended wait for nobody. All processes agree on which these are."""
        checked = [state for state in states if state.checked is not None]
        waiting = [state for state in checked if state.reason_to_end is None]
        ending = [state for state in checked if state.reason_to_end is not None]
        for state in [*ending, *waiting[: self._config.batches.at_once]]:
            self._runner.start(state.batch.id)

    # --- looking through a list ---------------------------------------------------------------------------------------

    def _begin_check(self, batch: StoredBatch) -> None:
        if batch.id not in self._checking and not self._stop.is_set():
            task = asyncio.create_task(self._check(batch))
            self._checking[batch.id] = task
            task.add_done_callback(lambda _: self._checking.pop(batch.id, None))

    async def _check(self, batch: StoredBatch) -> None:
        """Looks through a list, in a thread; another process takes over where this fails."""
        with context.within(context.Context(request_id=batch.id, key_id=batch.key_id)):
            try:
                loop, here = asyncio.get_running_loop(), copy_context()
                checked = await loop.run_in_executor(self._thread, here.run, self._checked, batch, loop)
                await self.look()
                logs.event("batch_checked", total=checked.total, refused=checked.refused, errors=len(checked.errors))
            except _Stopped:
                return
            except Exception as error:
                logs.event("batch_check_failed", level=logging.ERROR, error=error)

    def _checked(self, batch: StoredBatch, loop: asyncio.AbstractEventLoop) -> Checked:
        """Writes what the bulk job shall do, and what is refused. Two that do so at once write the same."""
        if self._stop.is_set() or self._is_checked(batch.id):
            raise _Stopped
        uri = self.folder.content_uri(batch.input_file_id)
        self._beat(batch.id)
        try:
            total, errors = check_list(uri, self._config.batches.max_requests)
        except FileNotFoundError:
            total, errors = 0, [ListError(code="file_not_found", message="the list was deleted")]
        refused = 0
        if not errors:
            try:
                model = Model.load(batch.job.bundle, batch.job.options)
            except (BundleError, ConfigError) as error:
                logs.event("batch_model_refused", level=logging.ERROR, error=error)
                errors = [ListError(code="server_error", message="the model of this batch cannot be used any more")]
        if not errors:
            refused = self._divide(batch, uri, LineReader(self._config, model, batch.id), loop)
        checked = Checked(at=int(time.time()), total=0 if errors else total, refused=refused, errors=tuple(errors))
        self.folder.write(batch.id, checked)
        return checked

    def _divide(self, batch: StoredBatch, uri: str, reader: LineReader, loop: asyncio.AbstractEventLoop) -> int:
        """How many lines are refused."""

        beaten = time.monotonic()

        def verdicts(prompts: Sequence[str]) -> Sequence[ApiError | None]:
            return asyncio.run_coroutine_threadsafe(self._verdicts(prompts), loop).result()

        def after_block() -> None:
            nonlocal beaten
            if self._stop.is_set() or self._is_checked(batch.id):
                raise _Stopped
            if time.monotonic() - beaten > _BEAT_S:
                self._beat(batch.id)
                beaten = time.monotonic()

        prompts, refused = (self.folder.batch_uri(batch.id, name) for name in ("prompts.jsonl", "refused.jsonl"))
        return divide_list(uri, reader, verdicts, prompts=prompts, refused=refused, after_block=after_block)

    async def _verdicts(self, prompts: Sequence[str]) -> Sequence[ApiError | None]:
        room = asyncio.Semaphore(_PROMPTS_AT_ONCE)

        async def verdict(prompt: str) -> ApiError | None:
            async with room:
                try:
                    await self._policy.check_prompts([prompt])
                except ContentRefused as refused:
                    return refused
            return None

        return await asyncio.gather(*(verdict(prompt) for prompt in prompts))

    def _beat(self, batch_id: str) -> None:
        """Says that this process looks through a list."""
        storage.write_json(self._claim(batch_id), {"process": self._name, "beat": secrets.token_hex(8)})

    def _is_checked(self, batch_id: str) -> bool:
        state = self.folder.state(batch_id)
        return state is None or state.checked is not None

    def _is_left_alone(self, batch_id: str) -> bool:
        """Whether who began to look through a list has given no sign for long, by this process's clock."""
        beat = None
        with suppress(FileNotFoundError, ValueError):
            beat = storage.read_json(self._claim(batch_id))
        seen, since = self._silent.setdefault(batch_id, (beat, time.monotonic()))
        if beat != seen:
            self._silent[batch_id] = (beat, time.monotonic())
            return False
        return time.monotonic() - since > _SILENT_S

    def _claim(self, batch_id: str) -> str:
        return self.folder.batch_uri(batch_id, "checking.json")

    # --- whose ---------------------------------------------------------------------------------------------------------

    def _is_ours(self, stored: StoredFile | StoredBatch) -> bool:
        return stored.key_id == context.current().key_id

    def _file(self, file_id: str) -> StoredFile:
        file = self.folder.file(file_id)
        if file is None or not self._is_ours(file):
            raise _no_file(file_id)
        return file

    def _state(self, batch_id: str) -> BatchState:
        state = self.folder.state(batch_id)
        if state is None or not self._is_ours(state.batch):
            raise NotFound(f"there is no batch {batch_id[:80]!r}", code="batch_not_found")
        return state


def _no_file(file_id: str) -> NotFound:
    return NotFound(f"there is no file {file_id[:80]!r}", code="file_not_found")


def _page(found: Iterator[T], limit: int) -> tuple[list[T], bool]:
    """The first ones, and whether there are more."""
    page = list(islice(found, limit + 1))
    return page[:limit], len(page) > limit


def _ends(page: Sequence[FileObject] | Sequence[BatchObject]) -> dict[str, str | None]:
    return {"first_id": page[0].id if page else None, "last_id": page[-1].id if page else None}
