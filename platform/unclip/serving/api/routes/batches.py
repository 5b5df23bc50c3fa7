"""Files and batches, as OpenAI's clients ask for them."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from unclip.serving.api.forms import invalid, read_json
from unclip.serving.api.openapi import answers, errors, takes_form, takes_json
from unclip.serving.api.routes.common import json_of
from unclip.serving.batches.batches import Batches
from unclip.serving.batches.objects import (
    BatchList,
    BatchObject,
    BatchRequest,
    FileDeleted,
    FileList,
    FileObject,
    FileRequest,
)
from unclip.serving.errors import InvalidRequest

_CONTENT = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_MAX_FIELDS = 8
_MAX_TEXT = 2**16

After = Annotated[str | None, Query(max_length=200, description="Begins behind the one of that id.")]
FilesLimit = Annotated[int, Query(ge=1, le=10_000, description="Most files of a page.")]
BatchesLimit = Annotated[int, Query(ge=1, le=100, description="Most batches of a page.")]
Order = Annotated[Literal["asc", "desc"], Query(description="By age: the oldest or the newest first.")]
OfPurpose = Annotated[str | None, Query(max_length=60, description="Only files with that purpose.")]


def batches_router(batches: Batches) -> APIRouter:
    """OpenAI's files and batches APIs. Who makes the app keeps `batches.running()` open while it runs."""
    router = APIRouter(prefix="/v1", tags=["batches"])
    _add_files(router, batches)
    _add_batches(router, batches)
    return router


def _add_files(router: APIRouter, batches: Batches) -> None:
    @router.post(
        "/files",
        response_class=Response,
        responses=answers(FileObject),
        openapi_extra=takes_form(FileRequest, {"file": "one"}),
    )
    async def create_file(request: Request) -> Response:
        """Takes in a list of requests: JSON Lines."""
        async with request.form(max_files=1, max_fields=_MAX_FIELDS, max_part_size=_MAX_TEXT) as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise InvalidRequest("file: required, but not given", code="missing_required_parameter", param="file")
            try:
                FileRequest.model_validate({name.partition("[")[0]: form[name] for name in form if name != "file"})
            except ValidationError as error:
                raise invalid(error, FileRequest) from None
            return json_of(await asyncio.to_thread(batches.add_file, file.file, file.filename or ""))

    @router.get("/files", response_class=Response, responses=answers(FileList))
    def list_files(
        after: After = None, limit: FilesLimit = 10_000, order: Order = "desc", purpose: OfPurpose = None
    ) -> Response:
        """Lists the key's files."""
        return json_of(batches.files(after=after, limit=limit, order=order, purpose=purpose))

    @router.get("/files/{file_id}", response_class=Response, responses=answers(FileObject))
    def retrieve_file(file_id: str) -> Response:
        """Tells what is known of a file."""
        return json_of(batches.file(file_id))

    @router.delete("/files/{file_id}", response_class=Response, responses=answers(FileDeleted))
    def delete_file(file_id: str) -> Response:
        """Takes a file away."""
        return json_of(batches.delete_file(file_id))

    @router.get(
        "/files/{file_id}/content",
        response_class=Response,
        responses={200: {"description": "The content", "content": _CONTENT}, **errors(401, 404, 429, 500)},
    )
    def retrieve_content(file_id: str) -> Response:
        """Hands out what is in a file."""
        size, pieces = batches.content(file_id)
        headers = {"content-length": str(size)}
        return StreamingResponse(pieces, headers=headers, media_type="application/octet-stream")


def _add_batches(router: APIRouter, batches: Batches) -> None:
    @router.post(
        "/batches",
        response_class=Response,
        responses=answers(BatchObject),
        openapi_extra=takes_json(BatchRequest),
    )
    async def create_batch(request: Request) -> Response:
        """Has a list worked off."""
        return json_of(await batches.create(await read_json(request, BatchRequest)))

    @router.get("/batches", response_class=Response, responses=answers(BatchList))
    def list_batches(after: After = None, limit: BatchesLimit = 20) -> Response:
        """Lists the key's batches, the newest first."""
        return json_of(batches.batches(after=after, limit=limit))

    @router.get("/batches/{batch_id}", response_class=Response, responses=answers(BatchObject))
    def retrieve_batch(batch_id: str) -> Response:
        """Tells how far a batch is."""
        return json_of(batches.batch(batch_id))

    @router.post("/batches/{batch_id}/cancel", response_class=Response, responses=answers(BatchObject))
    def cancel_batch(batch_id: str) -> Response:
        """Ends a batch; what is done by then is handed out."""
        return json_of(batches.cancel(batch_id))
