"""Pictures by their address."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.responses import Response

from unclip.serving.api.openapi import errors
from unclip.serving.drawing.service import Service
from unclip.serving.errors import NotFound

_CONTENT = {
    media: {"schema": {"type": "string", "format": "binary"}} for media in ("image/png", "image/jpeg", "image/webp")
}


def pictures_router(service: Service) -> APIRouter:
    """What answers with `response_format` url point at."""
    router = APIRouter(prefix="/v1/pictures", tags=["images"])

    @router.get(
        "/{name}",
        response_class=Response,
        responses={200: {"content": _CONTENT, "description": "The picture"}, **errors(404, 500)},
    )
    async def picture(name: str) -> Response:
        """Hands out a picture, for a while after it was made."""
        if service.store is None:
            raise NotFound("this server keeps no pictures", code="picture_not_found", param="name")
        content, media_type = await asyncio.to_thread(service.store.get, name)
        lifetime = f"private, max-age={service.config.pictures.lifetime_s}, immutable"
        return Response(content, media_type=media_type, headers={"cache-control": lifetime})

    return router
