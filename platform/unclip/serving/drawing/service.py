"""What the API does: orders drawn by the chain, within limits and policy, encoded for clients."""

from __future__ import annotations

import asyncio
import base64
import tempfile
import time
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

from unclip.data.decode import Picture
from unclip.generation.engine.request import Request, Result
from unclip.serving.config import ServeConfig
from unclip.serving.drawing.orders import Order
from unclip.serving.drawing.previews import Previews
from unclip.serving.drawing.studio import Studio
from unclip.serving.errors import ApiError, ContentRefused, InvalidRequest, NotFound, RateLimited
from unclip.serving.groups import Shown
from unclip.serving.guards.admission import Admission
from unclip.serving.guards.keys import ApiKey, KeyLimits, KeyRing
from unclip.serving.guards.policy import Policy
from unclip.serving.messages.answers import PictureAnswer, PicturesAnswer
from unclip.serving.messages.events import HERE, Event, next_of
from unclip.serving.messages.failures import as_api_error
from unclip.serving.messages.schemas import StreamedBody
from unclip.serving.observe import logs
from unclip.serving.observe.meters import Meters
from unclip.serving.pictures.encoding import Encoder, scaled
from unclip.serving.pictures.provenance import Label, Signer
from unclip.serving.pictures.store import PictureStore
from unclip.serving.stages.chain import Chain
from unclip.serving.stages.model import Model, Models

Tell = Callable[[str, Mapping[str, Any]], None]
"""tell(name of the event, its data)."""
Check = Callable[[], Awaitable[None]]
"""Raises where the process is not able to draw, and says why."""

_NO_TOKENS = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}
"""OpenAI's clients expect them; tokens are not counted here."""


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Args:
        key: None where the server asks for none.
        address: of the server as this client knows it, with a slash at its end.
    """

    key: ApiKey | None
    address: str


@dataclass(frozen=True)
class Service:
    """All that the routes need; for one event loop."""

    config: ServeConfig
    models: Models
    chain: Chain
    admission: Admission
    policy: Policy
    store: PictureStore | None
    keys: KeyRing | None
    limits: KeyLimits
    encoder: Encoder
    meters: Meters
    checks: Sequence[Check] = ()

    def model(self, name: str | None) -> Model:
        """The one that a request names; `NotFound` where it is not served."""
        if name is not None and name not in (self.config.model, *self.config.aliases):
            message = f"model = {name!r}: this server has {self.config.model!r}"
            raise NotFound(message, code="model_not_found", param="model")
        return self.models.current

    @contextmanager
    def admitted(self, caller: Caller, count: int) -> Iterator[None]:
        """The block is work of `count` pictures' size; raises where the key or the server takes on no more now."""
        with self._held(caller.key, count), self.admission.take(count):
            self._show_in_flight()
            try:
                yield
            finally:
                asyncio.get_running_loop().call_soon(self._show_in_flight)

    def studio(self, timeout_s: float | None) -> Studio:
        """For a request that begins now; `InvalidRequest` where it wants more time than there is."""
        most = self.config.limits.timeout_s
        if timeout_s is not None and timeout_s > most:
            raise InvalidRequest(f"timeout_s = {timeout_s}: at most {most:g}", code="invalid_value", param="timeout_s")
        ends = asyncio.get_running_loop().time() + (timeout_s or most)
        return Studio(self.chain, self.policy, self.config.limits.picture_pixels, ends)

    async def answer(self, order: Order, caller: Caller) -> PicturesAnswer:
        """All pictures of an order; if one of them fails, or nobody waits any more, the others end with it."""
        self._check_format(order)
        studio = self.studio(order.body.timeout_s)
        with self.admitted(caller, len(order.requests)):
            requests = await self._prepared(order, studio)
            async with asyncio.timeout_at(studio.ends), asyncio.TaskGroup() as group:
                drawing = _Drawing(self, order, studio, caller)
                tasks = [group.create_task(drawing.picture(*each)) for each in enumerate(requests)]
        return PicturesAnswer(
            created=int(time.time()),
            data=[task.result() for task in tasks],
            output_format=order.body.output_format or "png",
            size=order.size,
            model=self.config.model,
            revision=tasks[0].result().revision,
        )

    async def stream(self, order: Order, caller: Caller) -> AsyncGenerator[Event, None]:
        """The same step by step: a comment once the order is taken on, then what the body asks for; a failure is the last event.

        Closing it ends the work. A slow reader does not hold it up, nor keeps its place when it is done.
        """
        self._check_format(order)
        studio = self.studio(order.body.timeout_s)
        told: asyncio.Queue[Event | None] = asyncio.Queue()
        work = asyncio.create_task(self._tell_all(order, studio, caller, told))
        work.add_done_callback(lambda _: told.put_nowait(None))
        is_taken_on = False
        try:
            while (event := await next_of(told)) is not None:
                is_taken_on = True
                yield event
            if (error := work.exception()) is not None:
                if not is_taken_on:
                    raise error
                failure = as_api_error(error)
                logs.event("stream_failed", error=error, status=failure.status, code=failure.code)
                yield Event("error", failure.body)
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def _tell_all(self, order: Order, studio: Studio, caller: Caller, told: asyncio.Queue[Event | None]) -> None:
        def tell(name: str, data: Mapping[str, Any]) -> None:
            told.put_nowait(Event(name, {"type": name, **data}))

        with self.admitted(caller, len(order.requests)):
            told.put_nowait(HERE)
            requests = await self._prepared(order, studio)
            drawing = _Drawing(self, order, studio, caller)
            async with asyncio.timeout_at(studio.ends), asyncio.TaskGroup() as group:
                for index, request in enumerate(requests):
                    group.create_task(drawing.shown(index, request, tell))

    async def _prepared(self, order: Order, studio: Studio) -> Sequence[Request]:
        async with asyncio.timeout_at(studio.ends):
            if order.texts:
                await self.policy.check_prompts(order.texts)
            return order.requests if order.prepare is None else await order.prepare(studio)

    def _check_format(self, order: Order) -> None:
        if order.body.response_format == "url" and self.store is None:
            message = "response_format = 'url': this server keeps no pictures; ask for b64_json"
            raise InvalidRequest(message, code="unsupported", param="response_format")

    @contextmanager
    def _held(self, key: ApiKey | None, count: int) -> Iterator[None]:
        with ExitStack() as stack:
            if key is not None:
                try:
                    stack.enter_context(self.limits.hold(key, count))
                except RateLimited:
                    self.meters.count("unclip_serve_key_limited", key=key.id, limit="pictures")
                    raise
            yield

    def _show_in_flight(self) -> None:
        self.meters.set("unclip_serve_in_flight", self.admission.in_flight)


@dataclass(frozen=True)
class _Drawing:
    """The pictures of one order."""

    service: Service
    order: Order
    studio: Studio
    caller: Caller

    async def picture(self, index: int, request: Request) -> PictureAnswer:
        """Picture number `index`."""
        with self._counted():
            return await self._finished(index, request, await self.studio.draw(request))

    async def shown(self, index: int, request: Request, tell: Tell) -> None:
        """The same, with what the body wants to hear on the way."""
        body, prefix = self.order.body, "image_edit" if self.order.kind == "edit" else "image_generation"
        assert isinstance(body, StreamedBody)
        previews = Previews(body.partial_images or 0, list(self.order.model.plan(request).sizes))
        partial_images = 0
        with self._counted():
            async with aclosing(self.studio.watch(request, previews.shares)) as steps:
                async for step in steps:
                    if isinstance(step, Result):
                        done = await self._finished(index, request, step)
                        told = done.model_dump(mode="json", exclude_none=True)
                        tell(f"{prefix}.completed", self._said(index, self.order.side) | told | {"usage": _NO_TOKENS})
                        continue
                    if body.progress:
                        data = {"stage": step.stage, "steps": step.steps, "total": step.total}
                        tell("unclip.progress", {"picture": index, **data, "share": step.steps / step.total})
                    if previews.takes(step) and (shown := await self._preview(step, request.seed)) is not None:
                        side, content = shown
                        partial = {"b64_json": _base64(content), "partial_image_index": partial_images}
                        tell(f"{prefix}.partial_image", self._said(index, side) | partial)
                        partial_images += 1

    async def _preview(self, step: Shown, seed: int) -> tuple[int, bytes] | None:
        """Side and file of a partial image; None where the policy withholds it, which only judges the finished one."""
        assert step.picture is not None
        try:
            await self.service.policy.check_pictures([step.picture])
        except ContentRefused:
            return None
        side = min(len(step.picture), self.order.side)
        revision = self.order.model.digest
        return side, await asyncio.to_thread(self._encoded, scaled(step.picture, side), seed, revision)

    async def _finished(self, index: int, request: Request, result: Result) -> PictureAnswer:
        order, body = self.order, self.order.body
        picture = result.images[max(result.images)]
        await self.service.policy.check_pictures([picture])
        revision = str(result.settings["revision"])
        content = await asyncio.to_thread(self._encoded, scaled(picture, order.side), request.seed, revision)
        is_url, embed = body.response_format == "url", result.image_embed
        is_included = embed is not None and "image_embed" in (body.include or ())
        return PictureAnswer(
            b64_json=None if is_url else _base64(content),
            url=await self._address(content) if is_url else None,
            seed=request.seed,
            revision=revision,
            parameters=order.repeats(index),
            image_embed=embed.tolist() if is_included and embed is not None else None,
            **order.extras[index],
        )

    async def _address(self, content: bytes) -> str:
        assert self.service.store is not None
        name = await asyncio.to_thread(self.service.store.put, content, self.order.body.output_format or "png")
        return f"{self.caller.address}v1/pictures/{name}"

    def _encoded(self, picture: Picture, seed: int, revision: str) -> bytes:
        model, body = self.order.model, self.order.body
        label = Label(
            model=self.service.config.model,
            revision=revision,
            seed=seed,
            created=int(time.time()),
            is_composite=self.order.is_composite,
            attribution=model.attribution,
        )
        form = body.output_format or "png"
        return self.service.encoder.encode(picture, form=form, compression=body.output_compression, label=label)

    def _said(self, index: int, side: int) -> dict[str, Any]:
        """What all events of a picture say."""
        said = {"size": f"{side}x{side}", "quality": "high", "background": "opaque"}
        form = self.order.body.output_format or "png"
        return {**said, "output_format": form, "created_at": int(time.time()), "picture": index}

    @contextmanager
    def _counted(self) -> Iterator[None]:
        outcome = "finished"
        try:
            yield
        except TimeoutError:
            outcome = "expired"
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except ApiError as error:
            outcome = "expired" if error.code == "timeout" else "failed"
            raise
        except BaseException:
            outcome = "failed"
            raise
        finally:
            self.service.meters.count("unclip_serve_pictures", kind=self.order.kind, outcome=outcome)


def build_service(
    config: ServeConfig,
    chain: Chain,
    models: Models,
    *,
    meters: Meters,
    processes: int = 1,
    checks: Sequence[Check] = (),
) -> Service:
    """The service of one process.

    Args:
        processes: that speak HTTP, among which limits are divided.
        checks: of what this process needs to draw, for `GET /health`.

    Raises `ConfigError` where keys, policy or certificates cannot be used.
    """
    return Service(
        config=config,
        models=models,
        chain=chain,
        admission=Admission(max(1, config.limits.pictures // processes)),
        policy=Policy.build(config.policy, chain, meters),
        store=_store(config, processes),
        keys=None if config.keys is None else KeyRing.load(config.keys),
        limits=KeyLimits(processes),
        encoder=Encoder(Signer.from_config(config.provenance)),
        meters=meters,
        checks=tuple(checks),
    )


def _store(config: ServeConfig, processes: int) -> PictureStore | None:
    """None where processes would not find each other's pictures."""
    pictures = config.pictures
    if pictures.folder is not None:
        return PictureStore(pictures.folder, pictures.lifetime_s)
    if processes > 1:
        return None
    folder = tempfile.TemporaryDirectory(prefix="unclip-pictures-")
    store = PictureStore(folder.name, pictures.lifetime_s)
    weakref.finalize(store, folder.cleanup)
    return store


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
