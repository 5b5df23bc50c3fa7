"""Pictures: of captions, and of parts of a picture."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from unclip.serving.api.forms import read_form, read_json
from unclip.serving.api.openapi import answers, takes_form, takes_json
from unclip.serving.api.routes.common import drawn
from unclip.serving.drawing import manipulations, orders
from unclip.serving.drawing.service import Service
from unclip.serving.messages.answers import PicturesAnswer
from unclip.serving.messages.schemas import EditBody, GenerationBody, VariationBody


def images_router(service: Service) -> APIRouter:
    """OpenAI's images API."""
    router = APIRouter(prefix="/v1/images", tags=["images"])
    limits = service.config.limits

    @router.post(
        "/generations",
        response_class=Response,
        responses=answers(PicturesAnswer, stream=True),
        openapi_extra=takes_json(GenerationBody),
    )
    async def generate(request: Request) -> Response:
        """Draws pictures of a caption."""
        body = await read_json(request, GenerationBody)
        return await drawn(service, orders.generation(body, service.model(body.model), limits), request)

    @router.post(
        "/edits",
        response_class=Response,
        responses=answers(PicturesAnswer, stream=True),
        openapi_extra=takes_form(EditBody, {"image": "one", "mask": "optional"}),
    )
    async def edit(request: Request) -> Response:
        """Draws a part of a picture anew: where `mask`, or without one `image` itself, is fully transparent."""
        body, form = await read_form(request, EditBody, ("image", "mask"))
        image, mask = form.file("image"), form.optional_file("mask")
        order = manipulations.edit(body, image, mask, service.model(body.model), limits)
        return await drawn(service, order, request)

    @router.post(
        "/variations",
        response_class=Response,
        responses=answers(PicturesAnswer),
        openapi_extra=takes_form(VariationBody, {"image": "one"}),
    )
    async def vary(request: Request) -> Response:
        """Draws other pictures of what CLIP sees in one."""
        body, form = await read_form(request, VariationBody, ("image",))
        order = manipulations.variations(body, form.file("image"), service.model(body.model), limits)
        return await drawn(service, order, request)

    return router
