"""The bodies of requests, JSON or forms, as the models of `schemas`; what does not fit is told by OpenAI's error codes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.datastructures import UploadFile
from starlette.requests import Request

from unclip.serving.errors import InvalidRequest

B = TypeVar("B", bound=BaseModel)

_MAX_FILES = 65
"""The most pictures that an interpolation goes through, and one more for the message that says so."""
_MAX_FIELDS = 10_000
"""An embedding may come as a field for each of its numbers."""
_MAX_TEXT = 2**18
"""Bytes of a text field."""
_SHOWN = 100
"""Characters of a value in a message."""
_NAME = re.compile(r"(\w+)((?:\[\w*\])*)", re.ASCII)
_LISTS = {"include"}
"""Fields that are lists, also where a form names them without brackets, as OpenAPI's forms do."""
_CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}


@dataclass(frozen=True)
class SentForm:
    """A form: its text fields as a tree, and the contents of its files by field, each in the order they came in."""

    fields: Mapping[str, Any]
    files: Mapping[str, list[bytes]]

    def file(self, field: str) -> bytes:
        """The one file of a field."""
        found = self.optional_file(field)
        if found is None:
            raise InvalidRequest(f"{field}: required, but not given", code=_CODES["missing"], param=field)
        return found

    def optional_file(self, field: str) -> bytes | None:
        """The one file of a field, or none."""
        found = self.files.get(field, [])
        if len(found) > 1:
            raise InvalidRequest(f"{field}: {len(found)} files; one is allowed", code="invalid_value", param=field)
        return found[0] if found else None


async def read_json(request: Request, model: type[B]) -> B:
    """The JSON body of a request; texts are not taken for numbers."""
    _check_content_type(request, "application/json")
    try:
        return model.model_validate_json(await request.body(), strict=True)
    except ValidationError as error:
        raise invalid(error, model) from None


async def read_form(request: Request, model: type[B], files: Collection[str]) -> tuple[B, SentForm]:
    """The multipart body of a request.

    Lists are fields `name[]`, objects `name[key]`, as the `openai` client writes them.

    Args:
        files: the fields that are files.
    """
    _check_content_type(request, "multipart/form-data")
    texts: list[tuple[str, str]] = []
    found: dict[str, list[bytes]] = {}
    async with request.form(max_files=_MAX_FILES, max_fields=_MAX_FIELDS, max_part_size=_MAX_TEXT) as form:
        for name, value in form.multi_items():
            field = name.removesuffix("[]")
            if isinstance(value, UploadFile) != (field in files):
                kind = "a file" if field in files else "text"
                raise InvalidRequest(f"{field[:_SHOWN]}: must be {kind}", code="invalid_type", param=field[:_SHOWN])
            if isinstance(value, UploadFile):
                found.setdefault(field, []).append(await value.read())
            else:
                texts.append((name, value))
    sent = SentForm(_tree(texts), found)
    try:
        return model.model_validate(sent.fields), sent
    except ValidationError as error:
        raise invalid(error, model) from None


def invalid(error: ValidationError, model: type[BaseModel]) -> InvalidRequest:
    """The first thing that is wrong, as clients are told it."""
    problem = error.errors(include_url=False)[0]
    path = [str(part) for part in problem["loc"]]
    if problem["type"] == "json_invalid":
        return InvalidRequest(f"the body is not valid JSON: {problem['ctx']['error']}", code="invalid_json")
    field = ".".join(part for part in path if re.fullmatch(r"\w+", part, re.ASCII))[:_SHOWN] or None
    code = _CODES.get(problem["type"], "invalid_value")
    return InvalidRequest(_message(problem, field or "the body", model), code=code, param=field)


def _message(problem: ErrorDetails, field: str, model: type[BaseModel]) -> str:
    if problem["type"] == "missing":
        return f"{field}: required, but not given"
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(field, model.model_fields, n=1)
        return f"{field}: unknown field" + (f"; did you mean {close[0]}?" if close else "")
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem["input"], Mapping | list | bytes | BaseModel):
        return f"{field}: {message}"
    return f"{field} = {str(problem['input'])[:_SHOWN]!r}: {message}"


def _check_content_type(request: Request, expected: str) -> None:
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != expected:
        raise InvalidRequest(f"content-type = {given[:_SHOWN]!r}: must be {expected}", code="invalid_content_type")


def _tree(items: list[tuple[str, str]]) -> dict[str, Any]:
    """The fields of a form as an object."""
    root: dict[str, Any] = {}
    for name, value in items:
        match = _NAME.fullmatch(name)
        if match is None:
            raise InvalidRequest(f"{name[:_SHOWN]!r}: no name of a field", code="unknown_parameter")
        keys = [match[1], *re.findall(r"\[(\w*)\]", match[2])]
        if keys[0] in _LISTS and len(keys) == 1:
            keys.append("")
        is_item = keys[-1] == ""
        path, place = keys[:-1] if is_item else keys, root
        for key in path[:-1]:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise _twice(match[1])
        if is_item and isinstance(place.setdefault(path[-1], []), list):
            place[path[-1]].append(value)
        elif is_item or path[-1] in place:
            raise _twice(match[1])
        else:
            place[path[-1]] = value
    return root


def _twice(field: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: given twice; lists are fields {field}[]", code="invalid_value", param=field)
