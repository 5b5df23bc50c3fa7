"""The same cascade behind `@serve.batch`: what a team would write around a pipeline."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from benchmarks.engine.together import together
from PIL import Image
from ray import serve
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse

from unclip.cluster import session
from unclip.generation.engine.request import Picture, Request
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.pipeline import Pipeline

How = Literal["grouped", "static"]
Draw = Callable[[Pipeline, Sequence[Request]], list[Picture]]


def grouped(pipeline: Pipeline, batch: Sequence[Request]) -> list[Picture]:
    """A call of the pipeline for all that ask for the same; the largest pictures, in the order of the requests."""
    groups: dict[GenerationOptions, list[int]] = {}
    for number, request in enumerate(batch):
        groups.setdefault(request.options, []).append(number)
    found: dict[int, Picture] = {}
    for options, numbers in groups.items():
        prompts, seeds = [batch[number].prompt or "" for number in numbers], [batch[number].seed for number in numbers]
        images = pipeline(prompts, seeds, options=options).images
        found |= dict(zip(numbers, images[max(images)], strict=True))
    return [np.asarray(found[number]) for number in range(len(batch))]


def static(pipeline: Pipeline, batch: Sequence[Request]) -> list[Picture]:
    """All of them together through each stage, whatever they ask for: the best that can be done without the engine."""
    made = together(pipeline, batch)
    return [picture.numpy() for picture in made[max(made)]]


DRAWS: dict[How, Draw] = {"grouped": grouped, "static": static}


def request_of(body: dict[str, Any]) -> Request:
    """The picture that an API request asks for."""
    side = int(body["size"].split("x")[0])
    options = GenerationOptions().merged({**body["options"], "up_to": side})
    return Request(prompt=body["prompt"], seed=body["seed"], options=options)


class Batched:
    """A deployment: JSON in, a PNG as base64 out, batches of up to `size` requests between them."""

    def __init__(self, bundle: str, how: How, size: int, wait: float, threads: int) -> None:
        torch.set_num_threads(threads)
        self._pipeline, self._draw_all = Pipeline.from_bundle(bundle), DRAWS[how]
        self._draw.set_max_batch_size(size)
        self._draw.set_batch_wait_timeout_s(wait)

    async def __call__(self, http: HttpRequest) -> JSONResponse:
        content = await self._draw(request_of(await http.json()))
        return JSONResponse({"data": [{"b64_json": base64.b64encode(content).decode()}]})

    @serve.batch
    async def _draw(self, batch: list[Request]) -> list[bytes]:
        pictures = await asyncio.to_thread(self._draw_all, self._pipeline, batch)
        return [_png(picture) for picture in pictures]


@contextmanager
def running_batched(bundle: str, how: How, *, size: int, wait: float, threads: int, port: int) -> Iterator[str]:
    """Its address."""
    with session.session():
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        deployment = serve.deployment(Batched, name="Batched", max_ongoing_requests=1000)
        try:
            serve.run(deployment.bind(bundle, how, size, wait, threads), name="batched", route_prefix="/")
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()


def _png(picture: Picture) -> bytes:
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "png")
    return content.getvalue()
