"""What is served."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from unclip.serving.api.description import describe_model
from unclip.serving.api.openapi import answers
from unclip.serving.api.routes.common import json_of
from unclip.serving.drawing.service import Service
from unclip.serving.messages.answers import ModelAnswer, ModelsAnswer


def models_router(service: Service) -> APIRouter:
    """OpenAI's models API."""
    router = APIRouter(prefix="/v1/models", tags=["models"])

    @router.get("", response_class=Response, responses=answers(ModelsAnswer))
    async def models() -> Response:
        """Lists the model."""
        return json_of(ModelsAnswer(data=[describe_model(service)]))

    @router.get("/{model}", response_class=Response, responses=answers(ModelAnswer))
    async def retrieve(model: str) -> Response:
        """Tells what can be asked of the model, by its name or an alias."""
        service.model(model)
        return json_of(describe_model(service))

    return router
