"""Orders that begin with pictures of the client's: edits, variations, interpolations, text diffs.

They draw what `unclip.pipelines.manipulations` draws.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional

from unclip.data.decode import Picture
from unclip.data.transforms import area_downscale
from unclip.generation.engine.request import Request
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.inversion import deterministic
from unclip.pipelines.known import KnownPixels, known_at
from unclip.pipelines.manipulations.inpainting import FEATHER
from unclip.pipelines.manipulations.sphere import slerp
from unclip.pipelines.manipulations.text_diff import DUMMY_CAPTION, LEAST_DIFFERENCE, MAX_THETA, thetas
from unclip.serving.config import LimitsConfig
from unclip.serving.drawing.orders import (
    Kind,
    Order,
    Prepare,
    captioned,
    check,
    check_count,
    options_of,
    seed,
    sizes,
    stand_in,
    unless_refused,
    variation,
)
from unclip.serving.drawing.studio import Studio
from unclip.serving.errors import InvalidRequest
from unclip.serving.guards.uploads import Upload, read_keep, square, square_keep
from unclip.serving.messages.schemas import DrawingBody, EditBody, InterpolationBody, TextDiffBody, VariationBody
from unclip.serving.stages.model import Model


def edit(body: EditBody, image: bytes, mask: bytes | None, model: Model, limits: LimitsConfig) -> Order:
    """A picture of which the transparent pixels, of `mask` or its own, are drawn anew."""
    order = captioned("edit", body, model, limits)
    cascade = model.plan(order.requests[0])
    inner = order.prepare

    async def prepare(studio: Studio) -> Sequence[Request]:
        requests = order.requests if inner is None else await inner(studio)
        upload = await studio.read(image, "image")
        cover = upload if mask is None else await studio.read(mask, "mask")
        sides = sorted(cascade.sizes.values())
        picture, known = await asyncio.to_thread(_known, upload, cover, sides)
        await studio.policy.check_pictures([picture], given=True)
        return [replace(request, known=known) for request in requests]

    return replace(order, prepare=prepare, is_composite=True)


def variations(body: VariationBody, image: bytes, model: Model, limits: LimitsConfig) -> Order:
    """Pictures with the image embedding of this one."""

    async def prepare(studio: Studio) -> Sequence[Request]:
        pictures = await _read(studio, [image], model)
        embed = (await studio.picture_embeds(pictures))[0]
        return [replace(request, image_embed=embed) for request in order.requests]

    _check_clip(model)
    order = variation(body, model, limits, prepare)
    return order


def interpolation(body: InterpolationBody, images: Sequence[bytes], model: Model, limits: LimitsConfig) -> Order:
    """The way through these pictures, in their order."""
    frames = body.frames or 5
    if len(images) < 2:
        raise InvalidRequest(
            f"image: {len(images)} pictures; a way needs at least 2", code="invalid_value", param="image"
        )
    count = (len(images) - 1) * (frames - 1) + 1
    way = _Way.plan(body, model, limits, count=count)
    places = torch.arange(count)
    first = (places // (frames - 1)).clamp(max=len(images) - 2)
    share = places.double() / (frames - 1) - first

    async def prepare(studio: Studio) -> Sequence[Request]:
        pictures = await _read(studio, images, model)
        ends = await studio.picture_embeds(pictures)
        embeds = _between(ends[first], ends[first + 1], share)
        if body.noise == "shared":
            return way.requests(embeds, None)
        x_T = await way.inverted(studio, pictures, ends)
        return way.requests(embeds, slerp(x_T[first], x_T[first + 1], share))

    extras = [{"share": place / (frames - 1)} for place in range(count)]
    return way.order("interpolation", extras, prepare)


def text_diff(body: TextDiffBody, image: bytes, model: Model, limits: LimitsConfig) -> Order:
    """A picture on its way towards a caption."""
    path = thetas(body.frames or 5, MAX_THETA if body.max_theta is None else body.max_theta)
    way = _Way.plan(body, model, limits, count=len(path))
    source = DUMMY_CAPTION if body.source_prompt is None else body.source_prompt
    texts = (body.prompt, source) if source else (body.prompt,)

    async def prepare(studio: Studio) -> Sequence[Request]:
        pictures = await _read(studio, [image], model)
        embed = await studio.picture_embeds(pictures)
        towards = _direction(await studio.text_embeds(texts))
        x_T = await way.inverted(studio, pictures, embed)
        count = len(path)
        share = torch.tensor(path, dtype=torch.float64)
        embeds = _between(embed.expand(count, -1), (towards * embed.norm(dim=1, keepdim=True)).expand(count, -1), share)
        return way.requests(embeds, x_T.expand(count, -1, -1, -1))

    order = way.order("text_diff", [{"theta": theta} for theta in path], prepare)
    return replace(order, texts=texts)


@dataclass(frozen=True)
class _Way:
    """Pictures from image embeddings and noises, drawn without any other randomness in the decoder."""

    body: DrawingBody
    model: Model
    side: int
    plain: Request
    """What all of its pictures have in common."""
    backwards: Request
    """What all inversions have in common."""
    count: int

    @classmethod
    def plan(cls, body: InterpolationBody | TextDiffBody, model: Model, limits: LimitsConfig, *, count: int) -> _Way:
        """Raises `InvalidRequest` where the model cannot draw it."""
        check_count(count, limits, field="frames")
        _check_clip(model)
        native, side = sizes(body, model)
        options = options_of(body, model, native)
        embed, size = stand_in(model), model.sizes[0]
        plain = Request(image_embed=embed, seed=seed(body), options=_steady(options, body))
        blank = np.zeros((size, size, 3), np.uint8)
        there = _steady(options.merged({"decoder": {"eta": None}}), body)
        backwards = Request(image_embed=embed, inverts=blank, options=there)
        for request in (plain, backwards):
            check(request, body, model, limits)
        return cls(body, model, side, plain, backwards, count)

    def order(self, kind: Kind, extras: Sequence[Mapping[str, float]], prepare: Prepare) -> Order:
        """With one request for each of `extras`."""
        requests = [self.plain] * self.count
        return Order(kind, self.body, self.model, self.side, requests, extras, prepare=prepare)

    def requests(self, embeds: torch.Tensor, x_T: torch.Tensor | None) -> list[Request]:
        """A picture for each row of (N, D), from the noise of the same row of (N, 3, S, S)."""
        noises = [None] * len(embeds) if x_T is None else list(x_T)
        return [replace(self.plain, image_embed=embed, x_T=noise) for embed, noise in zip(embeds, noises, strict=True)]

    async def inverted(self, studio: Studio, pictures: Sequence[Picture], embeds: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S): the noise that leads back to each picture."""
        size = self.model.sizes[0]
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(
                    studio.draw(
                        replace(self.backwards, inverts=np.array(area_downscale(picture, size)), image_embed=embed)
                    )
                )
                for picture, embed in zip(pictures, embeds, strict=True)
            ]
        found = [task.result().x_T for task in tasks]
        return torch.stack([x_T for x_T in found if x_T is not None])


async def _read(studio: Studio, contents: Sequence[bytes], model: Model) -> list[Picture]:
    """Squares uint8 (S, S, 3) of uploaded pictures, S a multiple of the decoder's size, as large as there is use for."""
    pictures = []
    for content in contents:
        upload = await studio.read(content, "image")
        pictures.append(await asyncio.to_thread(square, upload.pixels, _side(upload, model)))
    await studio.policy.check_pictures(pictures, given=True)
    return pictures


def _side(upload: Upload, model: Model) -> int:
    """Never beyond what the picture has, unless that is less than the decoder's size, nor beyond what CLIP or a stage sees."""
    unit = model.sizes[0]
    useful = max(model.sizes[-1], model.clip_image_size or 0)
    most = -(-useful // unit) * unit
    has = min(upload.pixels.shape[:2]) // unit * unit
    return min(max(has, unit), most)


def _known(upload: Upload, cover: Upload, sides: Sequence[int]) -> tuple[Picture, dict[int, KnownPixels]]:
    """A picture at the largest size of the cascade, and what is kept of it at each."""
    keep = square_keep(read_keep(cover, upload.pixels.shape[:2]), sides[-1])
    if keep.all():
        raise InvalidRequest("mask: its transparent part is outside of the middle square", param="mask")
    picture = np.array(square(upload.pixels, sides[-1]))
    pixels, mask = torch.from_numpy(picture), torch.from_numpy(np.array(keep))
    return picture, known_at(pixels[None], mask[None], sides, feather=FEATHER)


def _direction(text_embeds: torch.Tensor) -> torch.Tensor:
    """z_d (1, D) of unit norm: from the second text, where there is one, to the first."""
    difference = text_embeds[:1] - text_embeds[1:].sum(0, keepdim=True)
    if float(difference.norm()) < LEAST_DIFFERENCE:
        message = "prompt: means the same to CLIP as source_prompt"
        raise InvalidRequest(message, code="invalid_value", param="prompt")
    return functional.normalize(difference, dim=1)


def _between(start: torch.Tensor, end: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    try:
        return slerp(start, end, share)
    except ValueError as error:
        raise InvalidRequest(f"image: {error}", code="invalid_value", param="image") from None


def _steady(options: GenerationOptions, body: DrawingBody) -> GenerationOptions:
    return unless_refused(lambda: deterministic(options), body)


def _check_clip(model: Model) -> None:
    if model.clip_image_size is None:
        raise InvalidRequest("the model has no CLIP that looks at pictures", code="unsupported", param="model")
