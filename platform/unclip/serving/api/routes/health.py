"""Whether this process is able to draw."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from unclip.serving.drawing.service import Service
from unclip.serving.messages.answers import HealthAnswer


def health_router(service: Service) -> APIRouter:
    """For load balancers and people; what replaces broken processes asks them itself."""
    router = APIRouter(tags=["health"])

    @router.get(
        "/health",
        response_class=Response,
        responses={
            200: {"model": HealthAnswer, "description": "It is"},
            503: {"model": HealthAnswer, "description": "It is not"},
        },
    )
    async def health() -> Response:
        """Tells whether the process is able to draw, and what is wrong where it is not."""
        reasons = []
        for check in service.checks:
            try:
                await check()
            except Exception as error:
                reasons.append(f"{type(error).__name__}: {error}")
        answer = HealthAnswer(status="failing" if reasons else "ok", reasons=reasons)
        return Response(answer.to_json(), 503 if reasons else 200, media_type="application/json")

    return router
