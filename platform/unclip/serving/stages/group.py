"""A group of stages in this process: weights, an engine, CLIP, and what tells whether they are well."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch

from unclip.config.base import ConfigError
from unclip.generation.engine.metrics import EngineMetrics
from unclip.generation.engine.request import (
    DeadlineError,
    EncodedCaption,
    EngineError,
    Picture,
    Request,
    Result,
    Ticket,
    Update,
)
from unclip.serving.config import STAGES, GroupStage, ServeConfig
from unclip.serving.groups import Call, Shown
from unclip.serving.observe.logs import event
from unclip.serving.observe.meters import Meters, NoMeters, publish, publish_devices
from unclip.serving.observe.timeline import Timeline
from unclip.serving.stages.encoder import ClipEncoder
from unclip.serving.stages.progress import Progress
from unclip.serving.stages.revisions import Loader, Revision, Revisions

_PUBLISH_SECONDS = 2.0
_DEVICE_SECONDS = 10.0
"""How long a device may take for next to nothing, beside the steps of the engine."""


def group_name(stages: tuple[GroupStage, ...]) -> str:
    """Of a group in meters and traces."""
    return "all" if stages == STAGES else "-".join(stages)


class UnhealthyError(RuntimeError):
    """The process cannot do its work any more; another one should take its place."""


class LocalGroup:
    """A `StageGroup` in this process. For one event loop.

    Args:
        config: of the server.
        stages: which it holds, as far as bundles have them.
        memory_share: of the device's free memory for the stages' batches; None: `config.engine.memory_share`.
        meters: told of the engine every few seconds, and of pictures when they are done.
    """

    def __init__(
        self,
        config: ServeConfig,
        stages: tuple[GroupStage, ...] = STAGES,
        *,
        memory_share: float | None = None,
        meters: Meters | None = None,
    ) -> None:
        share = config.engine.memory_share if memory_share is None else memory_share
        self.name = group_name(stages)
        self._meters = NoMeters() if meters is None else meters
        self._loader = Loader(config, stages, share)
        self._revisions = Revisions(self._loader)
        self._health = _Health(self._loader.device, config.limits.stalled_s)
        self._publishing: asyncio.Task[None] | None = None

    @property
    def refused(self) -> dict[str, str]:
        """Why a bundle was not taken on, by its address."""
        return self._revisions.refused

    async def load(self, uri: str) -> None:
        """Makes the bundle at `uri` the one that is used; the one before serves those that name it.

        Raises `BundleError`, `ConfigError` or `EngineError` for one that is refused; the one before goes on then.
        """
        before = self._digest  # not its weights, which may have to make room
        await self._revisions.load(uri)
        if before is not None:
            self._meters.set("unclip_serve_revision", 0, group=self.name, digest=before)
        if self._digest is not None:
            self._meters.set("unclip_serve_revision", 1, group=self.name, digest=self._digest)
        if self._publishing is None:
            self._publishing = asyncio.create_task(self._publish())

    async def generate(self, call: Call) -> Result:
        """What the group's stages make of a request."""
        began = time.monotonic()
        async with self._revisions.use(call.revision) as revision:
            timeline = Timeline()
            with self._under_way(revision, _left(call.request, began), timeline) as ticket:
                result = await asyncio.wrap_future(ticket)
            timeline.finish(result, self._meters, self.name)
            return result

    async def watch(self, call: Call, previews: Sequence[float]) -> AsyncGenerator[Shown | Result, None]:
        """As `generate`, with the steps on the way, and the result last; who closes it early ends the work.

        A slow reader misses steps, but no previews.
        """
        began = time.monotonic()
        async with self._revisions.use(call.revision) as revision:
            progress = Progress()
            timeline = Timeline(lambda update: progress.put(_shown(update, previews)))
            with self._under_way(revision, _left(call.request, began), timeline) as ticket:
                ticket.add_done_callback(lambda _: progress.ring())
                async for shown in progress.until(ticket.done):
                    yield shown
                result = ticket.result(0)
            timeline.finish(result, self._meters, self.name)
            yield result

    async def encode_texts(self, texts: Sequence[str], revision: str) -> list[EncodedCaption]:
        """z_t of captions, with the states of their tokens where the decoder is told them, on the CPU."""
        async with self._revisions.use(revision) as used:
            with self._watched_over():
                return await asyncio.wrap_future(_encoder_of(used).texts(texts))

    async def encode_pictures(self, pictures: Sequence[Picture], revision: str) -> torch.Tensor:
        """z_i (B, D) float32 of unit norm, on the CPU, of pictures uint8 (S, S, 3)."""
        async with self._revisions.use(revision) as used:
            with self._watched_over():
                return await asyncio.wrap_future(_encoder_of(used).pictures(pictures))

    def metrics(self) -> EngineMetrics | None:
        """Of the engine of the current weights; None where there is none."""
        current = self._revisions.current
        return None if current is None or current.worker is None else current.worker.metrics()

    def queued_steps(self) -> int:
        """Row steps that have to be taken for all that is under way, with whichever weights."""
        workers = (revision.worker for revision in self._revisions.held)
        return sum(worker.metrics().queued_steps for worker in workers if worker is not None)

    async def check_health(self) -> None:
        """Raises `UnhealthyError` with a reason where this process should be replaced."""
        if self._revisions.current is None and not self._revisions.is_changing:
            raise UnhealthyError("no weights are loaded")
        await self._health.check_device()
        for revision in self._revisions.held:
            self._health.check_revision(revision)

    async def close(self, patience_s: float) -> None:
        """Waits so long at most for what is under way, and ends the rest."""
        if self._publishing is not None:
            self._publishing.cancel()
        await self._revisions.close(patience_s)

    @property
    def _digest(self) -> str | None:
        current = self._revisions.current
        return None if current is None else current.digest

    @contextmanager
    def _under_way(self, revision: Revision, request: Request, timeline: Timeline) -> Iterator[Ticket]:
        """Drawn in the block; where that is left early, the slots are free before the engine's next step."""
        if revision.worker is None:
            raise ConfigError("this group takes no steps; it holds CLIP alone")
        with self._watched_over():
            ticket = revision.worker.submit(replace(request, watch=timeline))
            revision.tickets.add(ticket)
            ticket.add_done_callback(revision.tickets.discard)
            try:
                yield ticket
            finally:
                ticket.cancel()

    @contextmanager
    def _watched_over(self) -> Iterator[None]:
        """Failures of the stages are logged where they happen, and remembered where they are for good."""
        try:
            yield
        except EngineError as error:
            if error.__cause__ is not None:
                event("stage_failed", group=self.name, error=error)
                self._health.note(error)
            raise

    async def _publish(self) -> None:
        while True:
            metrics = self.metrics()
            if metrics is not None:
                publish(self._meters, metrics, self.name)
            if self._loader.device.type == "cuda":  # asking a device for its memory takes some of it
                with suppress(RuntimeError):  # a broken device: the health check says so
                    await asyncio.to_thread(publish_devices, self._meters)
            await asyncio.sleep(_PUBLISH_SECONDS)


class _Health:
    """What can go wrong with engines, encoders and their device; for one event loop.

    Args:
        stalled_s: longest that a step, or a call of CLIP, may take.
    """

    def __init__(self, device: torch.device, stalled_s: float) -> None:
        self._device, self._stalled_s = device, stalled_s
        self._broken: str | None = None
        self._progress: WeakKeyDictionary[Revision, tuple[int, float]] = WeakKeyDictionary()
        self._asking: asyncio.Future[None] | None = None
        self._asked_at = 0.0

    def note(self, error: BaseException) -> None:
        """Remembers errors after which nothing works on a CUDA device."""
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, torch.AcceleratorError):
                self._broken = f"{type(cause).__name__}: {cause}"
            cause = cause.__cause__

    def check_revision(self, revision: Revision) -> None:
        """Raises `UnhealthyError` where a thread is dead or does not get on."""
        worker, encoder = revision.worker, revision.encoder
        if worker is not None:
            if not worker.is_alive:
                raise UnhealthyError("the engine's thread is dead")
            self._check_seconds("the engine's step", worker.step_seconds)
            self._check_progress(revision)
        if encoder is not None:
            if not encoder.is_alive:
                raise UnhealthyError("the CLIP encoder's thread is dead")
            self._check_seconds("a call of CLIP", encoder.call_seconds)

    async def check_device(self) -> None:
        """Raises `UnhealthyError` where CUDA is broken; never waits for long. While it is asked, who comes waits too."""
        if self._broken is not None:
            raise UnhealthyError(f"the device is broken: {self._broken}")
        if self._device.type != "cuda":
            return
        loop = asyncio.get_running_loop()
        if self._asking is None or self._asking.done():
            self._asking, self._asked_at = loop.create_future(), loop.time()
            threading.Thread(target=_ask_device, args=(self._device, self._asking), daemon=True).start()
        try:
            async with asyncio.timeout_at(self._asked_at + _DEVICE_SECONDS):
                await asyncio.shield(self._asking)
        except TimeoutError:
            raise UnhealthyError(f"the device has not answered for {_DEVICE_SECONDS:g} seconds") from None
        except RuntimeError as error:
            raise UnhealthyError(f"the device is broken: {error}") from error

    def _check_seconds(self, name: str, seconds: float) -> None:
        if seconds > self._stalled_s:
            raise UnhealthyError(f"{name} has taken {seconds:.0f} s, above limits.stalled_s = {self._stalled_s:g}")

    def _check_progress(self, revision: Revision) -> None:
        """Whether steps end while there is work: that step after step begins does not show it."""
        assert revision.worker is not None
        steps = sum(stage.steps for stage in revision.worker.metrics().stages.values())
        now = time.monotonic()
        before, since = self._progress.get(revision, (steps, now))
        if steps != before or not revision.tickets:
            since = now
        self._progress[revision] = steps, since
        self._check_seconds("work without a finished step", now - since)


def _ask_device(device: torch.device, answered: asyncio.Future[None]) -> None:
    """On a stream of its own, which does not wait for the engine's."""
    error: BaseException | None = None
    try:
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            torch.ones(1, device=device).add_(1)
        stream.synchronize()
    except BaseException as found:
        error = found
    answered.get_loop().call_soon_threadsafe(_answer, answered, error)


def _answer(answered: asyncio.Future[None], error: BaseException | None) -> None:
    if answered.done():
        return
    if error is None:
        answered.set_result(None)
    else:
        answered.set_exception(error)


def _shown(update: Update, previews: Sequence[float]) -> Shown:
    """What is handed out of a step; computed in the engine's thread, so pictures are made of few."""
    steps = {max(1, round(share * update.total)) for share in previews}
    return Shown(update.stage, update.steps, update.total, update.picture() if update.steps in steps else None)


def _left(request: Request, began: float) -> Request:
    """With the time that is left of its timeout after it waited for weights."""
    if request.timeout is None:
        return request
    left = request.timeout - (time.monotonic() - began)
    if left <= 0:
        raise DeadlineError(f"not done within timeout = {request.timeout} seconds")
    return replace(request, timeout=left)


def _encoder_of(revision: Revision) -> ClipEncoder:
    if revision.encoder is None:
        raise ConfigError("this group holds no CLIP")
    return revision.encoder
