"""The OpenAPI page: bodies that routes read themselves, answers, and errors as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from unclip.serving.messages.answers import ErrorAnswer
from unclip.serving.messages.events import MEDIA_TYPE

Files = Mapping[str, Literal["one", "optional", "several"]]
"""Fields of a form that are pictures, by how often they are there."""

_ERRORS = {
    400: "A field is missing or wrong, or the content policy refuses it",
    401: "There is no API key, or one that is not known",
    404: "There is no such model or thing",
    413: "The body or a picture in it is too large",
    429: "A limit of the API key is reached; `Retry-After` says when to come again",
    500: "The server failed",
    503: "The server has as much to do as it takes on; `Retry-After` says when to come again",
    504: "The request was not done in its time",
}
_RETRY = {"Retry-After": {"description": "Seconds", "schema": {"type": "integer", "minimum": 1}}}
_PICTURE = {"type": "string", "format": "binary"}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that answers these errors, or all of them."""
    found: dict[int | str, dict[str, Any]] = {}
    for status in statuses or _ERRORS:
        found[status] = {"model": ErrorAnswer, "description": _ERRORS[status]}
        if status in (429, 503):
            found[status]["headers"] = _RETRY
    return found


def answers(model: type[BaseModel], *, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that answers `model`, or events where a stream is asked for, or any error."""
    found: dict[str, Any] = {"model": model, "description": "Done"}
    if stream:
        found["content"] = {MEDIA_TYPE: {}}  # each event has its own fields, which a schema here would say of all
    return {200: found, **errors()}


def takes_json(model: type[BaseModel]) -> dict[str, Any]:
    """The `openapi_extra` of a route that reads a JSON body."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _schema(model)}}}}


def takes_form(model: type[BaseModel], files: Files) -> dict[str, Any]:
    """The `openapi_extra` of a route that reads a form."""
    schema = _schema(model)
    pictures = {
        field: {"type": "array", "items": _PICTURE, "minItems": 2} if often == "several" else _PICTURE
        for field, often in files.items()
    }
    schema["properties"] = pictures | schema["properties"]
    needed = [field for field, often in files.items() if often != "optional"]
    schema["required"] = [*needed, *schema.get("required", [])]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def describe(app: FastAPI) -> dict[str, Any]:
    """The page, made once; in place of `app.openapi`."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    page = get_openapi(
        title=app.title,
        version=app.version,
        description=app.description,
        routes=app.routes,
        tags=app.openapi_tags,
    )
    schemas: dict[str, Any] = page.setdefault("components", {}).setdefault("schemas", {})
    schemas.pop("HTTPValidationError", None)
    schemas.pop("ValidationError", None)
    page["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in page["paths"].items():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            if path.startswith("/v1/") and not path.startswith("/v1/pictures/"):
                operation["security"] = [{"key": []}, {}]
            for content in operation.get("requestBody", {}).get("content", {}).values():
                schemas.update(content.get("schema", {}).pop("$defs", {}))
    app.openapi_schema = page
    return page


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    """With its parts in `$defs`, which `describe` moves to where its references look for them."""
    return model.model_json_schema(ref_template="#/components/schemas/{model}")
