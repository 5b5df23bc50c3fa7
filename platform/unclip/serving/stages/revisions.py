"""The weights that a process holds: one bundle's, and while requests change over to another one, both."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import time
import traceback
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch

from unclip.generation.device import DTYPES, chosen_device
from unclip.generation.engine.config import EngineConfig
from unclip.generation.engine.engine import Engine
from unclip.generation.engine.request import EngineError, Ticket
from unclip.generation.engine.route import Stages
from unclip.generation.engine.worker import EngineThread
from unclip.pipelines.bundle import Bundle, BundleError
from unclip.pipelines.cascade import plan_cascade
from unclip.pipelines.probe import check_probe
from unclip.pipelines.stages import DecoderStageConfig, StageConfig, StageName
from unclip.serving.config import GroupStage, ServeConfig
from unclip.serving.groups import UnknownRevisionError
from unclip.serving.observe.logs import event
from unclip.serving.stages.encoder import ClipEncoder


class Revision:
    """Stages of one bundle at work: an engine where any take steps, and an encoder where CLIP is among them."""

    def __init__(self, bundle: Bundle, stages: Stages, engine: EngineConfig, *, max_waiting: int) -> None:
        self.bundle, self.digest, self.stages = bundle, bundle.digest, stages
        decoder = bundle.configs.get("decoder")
        with_states, unit_norm = False, True
        if isinstance(decoder, DecoderStageConfig):
            with_states, unit_norm = decoder.model.text_states is not None, decoder.unit_norm
        self.worker = EngineThread(Engine(stages, engine), max_waiting=max_waiting) if stages.by_name else None
        self.encoder = None
        if stages.clip is not None:
            self.encoder = ClipEncoder(stages.clip, with_states=with_states, unit_norm=unit_norm)
        self.calls = 0
        """That use it."""
        self.is_asked_for = False
        """Whether a request has ever named it."""
        self.tickets: set[Ticket] = set()
        """Of the engine, under way."""
        self.passed_over: float | None = None
        """Since when another revision has been asked for, and this one not."""

    @property
    def slots(self) -> dict[StageName, int]:
        """Rows of each stage."""
        return {} if self.worker is None else {name: it.slots for name, it in self.worker.metrics().stages.items()}

    def close(self, patience_s: float = 0.0) -> None:
        """Waits so long at most for what is under way, and ends the rest."""
        if self.worker is not None:
            self.worker.close(patience=patience_s)
        if self.encoder is not None:
            self.encoder.close()


@dataclass(frozen=True)
class Loader:
    """Puts bundles to work: the stages `names` of each, within `memory_share` of what is free."""

    config: ServeConfig
    names: tuple[GroupStage, ...]
    memory_share: float

    @property
    def device(self) -> torch.device:
        """Where they run."""
        return chosen_device(self.config.device)

    def wanted(self, bundle: Bundle) -> dict[GroupStage, StageConfig | None]:
        """Of `names` what the bundle has and requests can go through, with its configuration (None: a CLIP elsewhere).

        Raises `BundleError` where that is nothing, and `ConfigError` where `config.options` do not suit the bundle.
        """
        cascade = plan_cascade(bundle.configs, self.config.options, with_prior="prior" in bundle.configs)
        there = [*(["clip"] if bundle.clip is not None else []), *cascade.sampling]
        found = {name: bundle.configs.get(name) for name in self.names if name in there}
        if not found:
            raise BundleError(f"{bundle.uri!r} has no {', '.join(self.names)}; requests go through {', '.join(there)}")
        return found

    def load(self, bundle: Bundle, beside: Revision | None) -> Revision:
        """Reads the weights and tries them out; blocks.

        Args:
            beside: at work on the same device meanwhile.

        Raises `BundleError` for what is damaged or has other outputs than where it was saved, `EngineError` for what does
        not fit into memory, and what `wanted` raises.
        """
        try:
            return self._load(bundle, beside)
        except (MemoryError, torch.OutOfMemoryError) as error:
            reason = str(error)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # which hold what was loaded
            raise
        raise EngineError(f"{bundle.uri!r} does not fit into memory: {reason}")

    def _load(self, bundle: Bundle, beside: Revision | None) -> Revision:
        wanted, dtype = self.wanted(bundle), DTYPES[self.config.precision]
        stages = Stages.load(bundle, tuple(wanted), device=self.device, dtype=dtype, options=self.config.options)
        for name, network in stages.networks.items():
            check_probe(bundle, name, network, device=self.device, dtype=torch.float32 if name == "clip" else dtype)
        engine = self.config.engine.merged({"memory_share": self.memory_share})
        if beside is not None and self.wanted(beside.bundle) == wanted:
            # What is free beside one that is at work says little, and this one will have its place.
            engine = engine.merged({"rows": beside.slots, "memory_bytes": sys.maxsize})
        # Cancelled requests count until the next step: for a moment there are more than were let in.
        return Revision(bundle, stages, engine, max_waiting=2 * self.config.limits.pictures)

    def fits_beside(self, bundle: Bundle, at_work: Revision) -> bool:
        """Whether it is worth trying: on a GPU that is at work, the memory of other shapes cannot be measured."""
        return self.device.type != "cuda" or self.wanted(bundle) == self.wanted(at_work.bundle)


class Revisions:
    """Takes a new bundle on beside the old one, which serves those that name it until nobody has for a while.

    Where both do not fit into memory, the old one ends what is under way and makes room; who names it meanwhile waits.

    Args:
        loader: puts them to work.
        idle_s: how long nobody may have named a revision, while another one was named, until it is closed.
    """

    def __init__(self, loader: Loader, *, idle_s: float = 10.0) -> None:
        self._loader, self._idle_s, self._drain_s = loader, idle_s, loader.config.limits.timeout_s
        self.current: Revision | None = None
        self.refused: dict[str, str] = {}
        """Why a bundle was not taken on, by its address."""
        self._held: dict[str, Revision] = {}
        self._changing: dict[str, asyncio.Event] = {}
        self._one_at_a_time = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_changing(self) -> bool:
        """Whether a bundle is being loaded."""
        return bool(self._changing)

    @property
    def held(self) -> list[Revision]:
        """All that are at work."""
        return list(self._held.values())

    async def load(self, uri: str) -> None:
        """Makes the bundle at `uri` the current one. Raises what it is refused for; the one before goes on then.

        Who stops waiting for it does not stop it.
        """
        await asyncio.shield(self._begin(self._load(uri)))

    @asynccontextmanager
    async def use(self, digest: str) -> AsyncIterator[Revision]:
        """The revision, which stays for the block. One that is being loaded is waited for.

        Raises `UnknownRevisionError` for one that is not there.
        """
        while digest not in self._held:
            if digest not in self._changing:
                raise UnknownRevisionError(f"no weights of revision {digest[:12]} here")
            await self._changing[digest].wait()
        revision = self._held[digest]
        self._named(revision)
        revision.calls += 1
        try:
            yield revision
        finally:
            revision.calls -= 1
            if revision is not self.current:
                revision.passed_over = None

    async def close(self, patience_s: float) -> None:
        """Ends all of them, after `patience_s` seconds for what is under way at most."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        held, self._held, self.current = self.held, {}, None
        await asyncio.gather(*(asyncio.to_thread(revision.close, patience_s) for revision in held))

    async def _load(self, uri: str) -> None:
        async with self._one_at_a_time:
            began = time.monotonic()
            try:
                bundle = await asyncio.to_thread(Bundle.load, uri)
                await self._take_on(bundle)
            except Exception as error:
                self.refused[uri] = str(error)
                event("bundle_refused", level=logging.ERROR, bundle=uri, error=error)
                raise
            self.refused.pop(uri, None)
            event("bundle_loaded", bundle=uri, revision=bundle.digest, seconds=time.monotonic() - began)

    async def _take_on(self, bundle: Bundle) -> None:
        digest = bundle.digest
        if digest not in self._held:
            changed = self._changing[digest] = asyncio.Event()
            try:
                self._held[digest] = await self._opened(bundle)
            finally:
                del self._changing[digest]
                changed.set()
        self.current = self._held[digest]
        for old in self.held:
            if old is not self.current:
                old.passed_over = None
                self._begin(self._retire(old.digest))

    async def _opened(self, bundle: Bundle) -> Revision:
        await self._close_retired()
        if self.current is None:
            return await asyncio.to_thread(self._loader.load, bundle, None)
        if self._loader.fits_beside(bundle, self.current):
            try:
                return await asyncio.to_thread(self._loader.load, bundle, self.current)
            except EngineError as error:
                event("bundle_does_not_fit_beside", bundle=bundle.uri, reason=str(error))
        return await self._opened_instead(bundle, self.current)

    async def _opened_instead(self, bundle: Bundle, old: Revision) -> Revision:
        """Where the old one has made room; it comes back where the new one is refused."""
        changed = self._changing[old.digest] = asyncio.Event()
        old_bundle = old.bundle
        try:
            await self._drain(old)
            del old
            try:
                return await self._alone(bundle)
            except Exception:
                self.current = self._held[old_bundle.digest] = await self._alone(old_bundle)
                raise
        finally:
            del self._changing[old_bundle.digest]
            changed.set()

    async def _alone(self, bundle: Bundle) -> Revision:
        """Loaded where nothing else is."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return await asyncio.to_thread(self._loader.load, bundle, None)

    async def _drain(self, revision: Revision) -> None:
        """Takes it away from new calls, and closes it when those under way have ended."""
        self._held.pop(revision.digest, None)
        if revision is self.current:
            self.current = None
        until = time.monotonic() + self._drain_s
        while revision.calls and time.monotonic() < until:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(revision.close)
        event("revision_closed", revision=revision.digest, calls=revision.calls)

    async def _close_retired(self) -> None:
        """There are two at most: where another part of the server has refused the new one, requests ask for the old one still."""
        if self.current is not None and not self.current.is_asked_for:
            self.current = next((other for other in self.held if other.is_asked_for), self.current)
        for revision in self.held:
            if revision is not self.current:
                await self._drain(revision)

    async def _retire(self, digest: str) -> None:
        """Closes it when nobody has named it for a while, though others were named."""
        while (revision := self._held.get(digest)) is not None and revision is not self.current:
            if not revision.calls and self._is_passed_over(revision):
                await self._drain(revision)
                return
            del revision  # which may have to make room meanwhile
            await asyncio.sleep(self._idle_s / 4)

    def _is_passed_over(self, revision: Revision) -> bool:
        since = revision.passed_over
        return since is not None and time.monotonic() - since >= self._idle_s

    def _named(self, revision: Revision) -> None:
        """While a part of the server goes on with the old bundle, pictures ask for both: the old one is still needed."""
        revision.passed_over, revision.is_asked_for = None, True
        if revision is self.current:
            for other in self._held.values():
                if other is not revision and other.passed_over is None:
                    other.passed_over = time.monotonic()

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
