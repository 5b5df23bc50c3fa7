"""Texts and pictures in CLIP's space."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from unclip.serving.api.forms import read_json
from unclip.serving.api.openapi import answers, takes_json
from unclip.serving.api.routes.common import caller_of, json_of
from unclip.serving.drawing.embeddings import embed
from unclip.serving.drawing.service import Service
from unclip.serving.messages.answers import EmbeddingsAnswer
from unclip.serving.messages.events import unless_gone
from unclip.serving.messages.schemas import EmbeddingBody


def embeddings_router(service: Service) -> APIRouter:
    """OpenAI's embeddings API, for pictures too."""
    router = APIRouter(prefix="/v1", tags=["embeddings"])

    @router.post(
        "/embeddings",
        response_class=Response,
        responses=answers(EmbeddingsAnswer),
        openapi_extra=takes_json(EmbeddingBody),
    )
    async def create(request: Request) -> Response:
        """Embeds texts and pictures."""
        body = await read_json(request, EmbeddingBody)
        return json_of(await unless_gone(embed(service, body, caller_of(request)), request.receive))

    return router
