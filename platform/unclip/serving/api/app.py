"""The HTTP app: OpenAI's images API and what is ours beside it, for any ASGI server."""

from __future__ import annotations

import functools
from importlib.metadata import version
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from unclip.serving.api.middleware import Requests
from unclip.serving.api.openapi import describe, errors
from unclip.serving.api.reference import CONTENT_SECURITY, reference
from unclip.serving.api.routes.embeddings import embeddings_router
from unclip.serving.api.routes.health import health_router
from unclip.serving.api.routes.images import images_router
from unclip.serving.api.routes.latents import latents_router
from unclip.serving.api.routes.models import models_router
from unclip.serving.api.routes.pictures import pictures_router
from unclip.serving.api.routes.playground import playground_router
from unclip.serving.drawing.service import Service
from unclip.serving.errors import ApiError, InvalidRequest, NotFound
from unclip.serving.guards.uploads import BodyLimit

if TYPE_CHECKING:
    from unclip.serving.batches.batches import Batches

_TITLE = "unclip"
_DESCRIPTION = """OpenAI's images API, so that its clients work with another `base_url`, and what is ours beside it.

Answers carry `x-request-id`; a client may choose it. Errors are OpenAI's objects."""
_FORM_ROOM = 2**20
"""Bytes of a list's form beside the list."""


class MethodNotAllowed(ApiError):
    """There is something at the path, but not by this method; `allowed` are those that may be used."""

    status = 405

    def __init__(self, message: str, *, allowed: str) -> None:
        super().__init__(message, code="method_not_allowed")
        self._allowed = allowed

    @property
    def headers(self) -> dict[str, str]:
        return {"allow": self._allowed}


def create_app(service: Service, *, batches: Batches | None = None) -> FastAPI:
    """The app of one process.

    Args:
        batches: None: there are no lists of requests.
    """
    limits = service.config.limits
    uploads = {} if batches is None else {"/v1/files": service.config.batches.max_bytes + _FORM_ROOM}
    app = FastAPI(
        title=_TITLE,
        version=version("unclip"),
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False, "operation_spans": False},
        middleware=[
            Middleware(Requests, keys=service.keys, limits=service.limits, meters=service.meters),
            Middleware(BodyLimit, limit=limits.body_bytes, others=uploads),
        ],
        exception_handlers={HTTPException: _http_error, RequestValidationError: _path_error},
    )
    for router in (images_router, latents_router, embeddings_router, models_router, pictures_router, health_router):
        app.include_router(router(service))
    if batches is not None:
        from unclip.serving.api.routes.batches import batches_router

        app.include_router(batches_router(batches), responses=errors())
    app.include_router(playground_router())
    app.openapi = functools.partial(describe, app)  # type: ignore[method-assign]
    app.add_route("/docs", functools.partial(_docs, app), include_in_schema=False)
    return app


async def _docs(app: FastAPI, _request: Request) -> Response:
    return HTMLResponse(reference(app.openapi()), headers={"content-security-policy": CONTENT_SECURITY})


async def _http_error(request: Request, error: Exception) -> Response:
    """What the framework refuses, as our own errors are answered."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        raise NotFound(f"there is nothing at {request.url.path[:200]}", code="not_found")
    if error.status_code == 405:
        raise MethodNotAllowed(f"{request.method} is not allowed here", allowed=(error.headers or {})["Allow"])
    raise InvalidRequest(str(error.detail))


async def _path_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    field = str(problem["loc"][-1])
    raise InvalidRequest(f"{field}: {problem['msg']}", code="invalid_value", param=field)
