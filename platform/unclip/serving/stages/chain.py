"""Leads pictures through the groups of stages, whatever the layout: the same picture from one process as from five."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import TypeVar

import torch

from unclip.config.base import ConfigError
from unclip.generation.engine.request import DeadlineError, EncodedCaption, Picture, Request, Result
from unclip.pipelines.bundle import BundleError
from unclip.pipelines.cascade import UPSAMPLERS, Cascade
from unclip.pipelines.stages import DecoderStageConfig, StageName
from unclip.serving import context
from unclip.serving.config import GroupStage
from unclip.serving.groups import Call, Shown, StageGroup, UnknownRevisionError
from unclip.serving.observe import traces
from unclip.serving.observe.meters import Meters, NoMeters
from unclip.serving.stages.group import group_name
from unclip.serving.stages.model import Model, Models
from unclip.serving.stages.patience import Patience
from unclip.serving.stages.progress import Progress

T = TypeVar("T")
Show = Callable[[Shown], None]

_GRACE_S = 1.0
"""Engines end what is over its time; this much later nobody waits for one that does not answer."""
_ENCODING_S = 60.0
"""Longest for encodings that are asked for by themselves."""


@dataclass(frozen=True)
class Part:
    """A group, the stages that it holds, and those of them that a picture goes through."""

    held: tuple[GroupStage, ...]
    group: StageGroup
    names: tuple[StageName, ...] = ()

    @property
    def name(self) -> str:
        """In meters and traces."""
        return group_name(self.held)


class Chain:
    """Draws pictures by the groups, and encodes by the one that holds CLIP.

    A call that fails for a reason that may pass (a process that is gone, or has too much to do) is made again until the
    request's time is up; one whose stage failed, once more. Where a group does not have the current weights, the whole
    picture is drawn with those before.

    Args:
        groups: each with the stages that it holds, in the order of the cascade.
        models: whose weights are asked for.
        meters: told of calls that are made again.
    """

    def __init__(
        self,
        groups: Sequence[tuple[tuple[GroupStage, ...], StageGroup]],
        models: Models,
        *,
        meters: Meters | None = None,
    ) -> None:
        self._parts = [Part(held, group) for held, group in groups]
        self.models = models
        self._meters = NoMeters() if meters is None else meters

    async def draw(self, request: Request) -> Result:
        """The picture of a request for the whole way; its `timeout` counts for all of it. `settings` has also the `revision`,
        the digest of the bundle whose weights drew it.

        Raises what `Model.plan` raises, `Overloaded` where the first group has too much to do, `DeadlineError`, and
        `StageFailedError`.
        """
        return await self._way(request)

    async def watch(self, request: Request, previews: Sequence[float]) -> AsyncGenerator[Shown | Result, None]:
        """As `draw`, with the steps on the way, each once, and the result last; who closes it early ends the work.

        A slow reader misses steps, but no previews.

        Args:
            previews: shares of the way through decoder and upsamplers, ascending, at which the picture is shown too.
        """
        progress = Progress()
        drawing = asyncio.create_task(self._way(request, previews, _Forwards(progress.put)))
        drawing.add_done_callback(lambda _: progress.ring())
        try:
            async for shown in progress.until(drawing.done):
                yield shown
            yield drawing.result()
        finally:
            drawing.cancel()
            await asyncio.gather(drawing, return_exceptions=True)

    async def encode_texts(self, texts: Sequence[str]) -> list[EncodedCaption]:
        """z_t of captions. Raises `ConfigError` where there is no CLIP, `Overloaded`, `DeadlineError`, `StageFailedError`."""
        return await self._in_time(_ENCODING_S, lambda model, patience: self._texts(texts, model, patience))

    async def encode_pictures(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """z_i (B, D) float32 of unit norm, on the CPU, of pictures uint8 (S, S, 3). Raises as `encode_texts`."""

        def embeds(model: Model, patience: Patience) -> Awaitable[torch.Tensor]:
            clip = self._clip_of(model)
            ask = partial(clip.group.encode_pictures, pictures, model.digest)
            return patience.answer(clip.name, ask, may_refuse=True)

        return await self._in_time(_ENCODING_S, embeds)

    def _texts(self, texts: Sequence[str], model: Model, patience: Patience) -> Awaitable[list[EncodedCaption]]:
        clip = self._clip_of(model)
        return patience.answer(clip.name, partial(clip.group.encode_texts, texts, model.digest), may_refuse=True)

    def _clip_of(self, model: Model) -> Part:
        for part in self._parts:
            if "clip" in part.held and model.bundle.clip is not None:
                return part
        raise ConfigError("embeddings need a CLIP; this server has none")

    async def _in_time(self, timeout: float | None, work: Callable[[Model, Patience], Awaitable[T]]) -> T:
        """`work`, or `DeadlineError` where a process does not answer."""
        patience = Patience.of(timeout, self._meters)
        try:
            async with asyncio.timeout(None if timeout is None else timeout + _GRACE_S):
                return await self._by_some_model(work, patience)
        except DeadlineError:
            raise
        except TimeoutError:
            raise DeadlineError(f"not done within timeout = {timeout} seconds") from None

    async def _by_some_model(self, work: Callable[[Model, Patience], Awaitable[T]], patience: Patience) -> T:
        """`work` with the current model, with the one before where a group does not have that, and again."""
        for attempt in count():
            unknown = None
            for model in (self.models.current, self.models.previous):
                try:
                    if model is not None:
                        return await work(model, patience)
                except UnknownRevisionError as error:
                    unknown = unknown or error
            assert unknown is not None
            await patience.pause(attempt, unknown)
        raise AssertionError("there is no end to counting")

    async def _way(
        self, request: Request, previews: Sequence[float] | None = None, show: Show = lambda _: None
    ) -> Result:
        """The picture, in its time."""
        return await self._in_time(
            request.timeout, lambda model, patience: self._drawn(_Trip(request, model, patience, previews, show))
        )

    async def _drawn(self, trip: _Trip) -> Result:
        """The picture by the weights of one model, in one group after the other."""
        way, began = trip.model.plan(trip.request), time.monotonic()
        for part in self._parts_of(way):
            if "clip" not in part.held and _reads_encodings(part, trip.model):
                await self._encode_captions(trip)
            request = trip.request_for(part, way)
            ask = trip.asking(part, request)
            trip.done.append(await trip.patience.answer(part.name, ask, may_refuse=not trip.done))
        made = _merged(trip.done, time.monotonic() - began)
        return replace(made, settings={**made.settings, "revision": trip.model.digest})

    def _parts_of(self, way: Cascade) -> list[Part]:
        """The groups that a picture goes through; `BundleError` where nobody holds one of its stages."""
        parts = [replace(part, names=tuple(name for name in way.sampling if name in part.held)) for part in self._parts]
        held = [name for part in parts for name in part.names]
        missing = [name for name in way.sampling if name not in held]
        if missing:
            raise BundleError(f"the request goes through {', '.join(missing)}, which no process of this server holds")
        return [part for part in parts if part.names]

    async def _encode_captions(self, trip: _Trip) -> None:
        """For groups that hold no CLIP; once for all of them."""
        request = trip.request
        texts = [text for text in (request.prompt, request.negative_prompt) if text is not None]
        if not texts or request.encoded is not None:
            return
        found = dict(zip(texts, await self._texts(texts, trip.model, trip.patience), strict=True))
        encoded, negative = (
            None if text is None else found[text] for text in (request.prompt, request.negative_prompt)
        )
        trip.request = replace(request, encoded=encoded, negative_encoded=negative)


@dataclass
class _Trip:
    """A picture on its way by the weights of one model."""

    request: Request
    model: Model
    patience: Patience
    previews: Sequence[float] | None
    """None where nobody watches."""
    show: Show
    done: list[Result] = field(default_factory=list)
    """What the groups have made, in their order."""

    def request_for(self, part: Part, way: Cascade) -> Request:
        """What a group is asked for: its stages alone, from what those before have made."""
        request, names = self.request, part.names
        if names == tuple(way.sampling):
            return request
        sizes = {way.sizes[name] for name in names if name in way.sizes}
        known = {size: pixels for size, pixels in request.known.items() if size in sizes}
        if names[0] in UPSAMPLERS:
            images = {size: picture for made in self.done for size, picture in made.images.items()}
            low_res = images[max(images)] if images else request.low_res
            return Request(low_res=low_res, stages=names, seed=request.seed, options=request.options, known=known)
        embed = self.done[-1].image_embed if self.done else request.image_embed
        x_T = request.x_T if "decoder" in names else None
        return replace(request, stages=names, image_embed=embed, known=known, x_T=x_T)

    def asking(self, part: Part, request: Request) -> Callable[[], Awaitable[Result]]:
        """Asks the group in the time that is left by then."""

        async def ask() -> Result:
            timeout = None if self.request.timeout is None else self.patience.left
            with traces.span("group", group=part.name, stages=" ".join(part.names)):
                here = replace(context.current(), trace=traces.headers())
                call = Call(replace(request, timeout=timeout), self.model.digest, here)
                if self.previews is None:
                    return await part.group.generate(call)
                async with aclosing(part.group.watch(call, self.previews)) as steps:
                    async for step in steps:
                        if isinstance(step, Result):
                            return step
                        self.show(step)
            raise AssertionError("the result comes last")

        return ask


class _Forwards:
    """Shows each step once, though calls may be made again."""

    def __init__(self, show: Show) -> None:
        self._show = show
        self._furthest: dict[StageName, int] = {}

    def __call__(self, shown: Shown) -> None:
        if shown.steps > self._furthest.get(shown.stage, 0):
            self._furthest[shown.stage] = shown.steps
            self._show(shown)


def _reads_encodings(part: Part, model: Model) -> bool:
    """Whether stages there are told what CLIP makes of captions."""
    decoder = model.configs["decoder"]
    assert isinstance(decoder, DecoderStageConfig)
    return "prior" in part.names or ("decoder" in part.names and decoder.model.text_states is not None)


def _merged(parts: Sequence[Result], seconds: float) -> Result:
    """Of the results of all groups the one of the whole way."""
    if len(parts) == 1:
        return parts[0]
    first, last = parts[0], parts[-1]
    sampling = {name: settings for part in parts for name, settings in part.settings["sampling"].items()}
    return Result(
        image_embed=next((part.image_embed for part in parts if part.image_embed is not None), None),
        images={size: picture for part in parts for size, picture in part.images.items()},
        x_T=next((part.x_T for part in parts if part.x_T is not None), None),
        seed=first.seed,
        settings={**last.settings, **first.settings, "sampling": sampling},
        queue_seconds=sum(part.queue_seconds for part in parts),
        seconds=seconds,
    )
