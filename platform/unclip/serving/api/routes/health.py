"""Whether this process is able to draw."""

from __future__ import annotations

import asyncio
import time

from fastapi import APIRouter
from starlette.responses import Response

from unclip.serving.drawing.service import Check, Service
from unclip.serving.messages.answers import HealthAnswer

_GOOD_FOR_S = 1.0


def health_router(service: Service) -> APIRouter:
    """For load balancers and people; what replaces broken processes asks them itself."""
    router = APIRouter(tags=["health"])
    checked = _Checked(service)

    @router.head("/health", include_in_schema=False)
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
        reasons = await checked.reasons()
        answer = HealthAnswer(status="failing" if reasons else "ok", reasons=reasons)
        return Response(answer.to_json(), 503 if reasons else 200, media_type="application/json")

    return router


class _Checked:
    """What was wrong a moment ago: whoever asks, without a key, has the groups of stages asked once a second at most."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._one_at_a_time = asyncio.Lock()
        self._found: list[str] = []
        self._until = 0.0

    async def reasons(self) -> list[str]:
        async with self._one_at_a_time:
            if time.monotonic() >= self._until:
                self._found = [reason for check in self._service.checks if (reason := await _failure(check))]
                self._until = time.monotonic() + _GOOD_FOR_S
            return self._found


async def _failure(check: Check) -> str:
    try:
        await check()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
