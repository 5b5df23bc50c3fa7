"""Ways through the space of pictures: from one to the next, and towards a caption."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from unclip.serving.api.forms import read_form
from unclip.serving.api.openapi import answers, takes_form
from unclip.serving.api.routes.common import drawn
from unclip.serving.drawing import manipulations
from unclip.serving.drawing.service import Service
from unclip.serving.messages.answers import PicturesAnswer
from unclip.serving.messages.schemas import InterpolationBody, TextDiffBody


def latents_router(service: Service) -> APIRouter:
    """Beside OpenAI's API: interpolations and text diffs."""
    router = APIRouter(prefix="/v1/images", tags=["ways"])
    limits = service.config.limits

    @router.post(
        "/interpolations",
        response_class=Response,
        responses=answers(PicturesAnswer),
        openapi_extra=takes_form(InterpolationBody, {"image": "several"}),
    )
    async def interpolate(request: Request) -> Response:
        """Draws the way from each picture to the next."""
        body, form = await read_form(request, InterpolationBody, ("image",))
        images = form.files.get("image", [])
        return await drawn(
            service, manipulations.interpolation(body, images, service.model(body.model), limits), request
        )

    @router.post(
        "/text-diffs",
        response_class=Response,
        responses=answers(PicturesAnswer),
        openapi_extra=takes_form(TextDiffBody, {"image": "one"}),
    )
    async def turn(request: Request) -> Response:
        """Draws a picture on its way from one caption to another."""
        body, form = await read_form(request, TextDiffBody, ("image",))
        order = manipulations.text_diff(body, form.file("image"), service.model(body.model), limits)
        return await drawn(service, order, request)

    return router
