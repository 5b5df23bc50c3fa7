"""Texts and pictures in CLIP's space, as clients are answered."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Sequence

import torch

from unclip.data.decode import Picture
from unclip.serving.drawing.service import Caller, Service
from unclip.serving.drawing.studio import Studio
from unclip.serving.errors import InvalidRequest, TooLarge
from unclip.serving.guards.uploads import square
from unclip.serving.messages.answers import Embedding, EmbeddingsAnswer
from unclip.serving.messages.schemas import MAX_INPUT_CHARACTERS, MAX_INPUTS, PROMPT_CHARACTERS, EmbeddingBody

_PICTURES = 4
"""Largest pictures that those of a request may come to together."""


async def embed(service: Service, body: EmbeddingBody, caller: Caller) -> EmbeddingsAnswer:
    """Embeddings of texts and, behind them, of pictures; they count as one picture against the limits."""
    model = service.model(body.model)
    texts = [body.input] if isinstance(body.input, str) else body.input or []
    pictures = body.images or []
    _check(texts, pictures)
    side = model.clip_image_size
    if side is None:
        raise InvalidRequest("the model has no CLIP", code="unsupported", param="model")
    studio = service.studio(None)
    with service.admitted(caller, 1):
        async with asyncio.timeout_at(studio.ends):
            parts = [await studio.text_embeds(texts)] if texts else []
            if pictures:
                parts.append(await studio.picture_embeds(await _squares(studio, pictures, side)))
    rows = torch.cat(parts)
    return EmbeddingsAnswer(
        data=[Embedding(index=index, embedding=_shown(row, body)) for index, row in enumerate(rows)],
        model=service.config.model,
        revision=model.digest,
    )


def _check(texts: Sequence[str], pictures: Sequence[str]) -> None:
    if not texts and not pictures:
        raise InvalidRequest("input, images: give one of them", code="missing_required_parameter", param="input")
    if len(texts) + len(pictures) > MAX_INPUTS:
        message = f"input, images: {len(texts) + len(pictures)} of them; at most {MAX_INPUTS} are allowed"
        raise InvalidRequest(message, code="invalid_value", param="input")
    for index, text in enumerate(texts):
        if not 0 < len(text) <= PROMPT_CHARACTERS:
            message = f"input.{index}: has {len(text)} characters; from 1 to {PROMPT_CHARACTERS} are allowed"
            raise InvalidRequest(message, code="invalid_value", param="input")
    if (total := sum(map(len, texts))) > MAX_INPUT_CHARACTERS:
        message = f"input: {total} characters; at most {MAX_INPUT_CHARACTERS} are allowed"
        raise InvalidRequest(message, code="invalid_value", param="input")


async def _squares(studio: Studio, pictures: Sequence[str], side: int) -> list[Picture]:
    """Small files may be large pictures, so that their pixels count together."""
    squares, left = list[Picture](), _PICTURES * studio.max_pixels
    for index, sent in enumerate(pictures):
        field = f"images.{index}"
        try:
            content = base64.b64decode(sent, validate=True)
        except (binascii.Error, ValueError):
            raise InvalidRequest(f"{field}: not base64", code="invalid_image", param=field) from None
        pixels = (await studio.read(content, field)).pixels
        left -= pixels.shape[0] * pixels.shape[1]
        if left < 0:
            most = _PICTURES * studio.max_pixels
            message = f"{field}: with those before it there are more than {most} pixels"
            raise TooLarge(message, code="request_too_large", param="images")
        squares.append(await asyncio.to_thread(square, pixels, side))
    return squares


def _shown(row: torch.Tensor, body: EmbeddingBody) -> list[float] | str:
    if body.encoding_format == "base64":
        return base64.b64encode(row.float().numpy().astype("<f4").tobytes()).decode()
    return row.tolist()
