"""Files and batches as clients see them: the objects of OpenAI's API.

Where something can only be one thing, its type says so; fields that never hold anything here are there for clients.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from unclip.config.base import Config
from unclip.serving.messages.answers import Answer

ENDPOINT: Literal["/v1/images/generations"] = "/v1/images/generations"
"""What the lines of a list may ask for."""
Purpose = Literal["batch", "batch_output"]
BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


class FileObject(Answer):
    """A file that was uploaded, or that came of a batch."""

    id: str
    """Its name in the API."""
    object: Literal["file"] = "file"
    """What this is."""
    bytes: int
    """Size."""
    created_at: int
    """Unix time in seconds."""
    filename: str
    """As it was uploaded."""
    purpose: Purpose
    """What it is for."""
    status: Literal["processed"] = "processed"
    """It is there."""


class FileList(Answer):
    """A page of files."""

    object: Literal["list"] = "list"
    """What this is."""
    data: tuple[FileObject, ...]
    """The files."""
    first_id: str | None = None
    """Of the first one."""
    last_id: str | None = None
    """Of the last one: `after` of the next page."""
    has_more: bool
    """Whether there is a next page."""


class FileDeleted(Answer):
    """Says that a file is gone."""

    id: str
    """Which."""
    object: Literal["file"] = "file"
    """What it was."""
    deleted: Literal[True] = True
    """That it is gone."""


class ListError(Answer):
    """Why a whole list is refused."""

    code: str
    """For programs."""
    message: str
    """For people."""
    line: int | None = None
    """Which line, from 1; lines that are empty do not count."""
    param: str | None = None
    """The field of the line that is to blame."""


class ListErrors(Answer):
    """All that was found, up to a number."""

    object: Literal["list"] = "list"
    """What this is."""
    data: tuple[ListError, ...]
    """The errors."""


class RequestCounts(Answer):
    """Lines of a batch; once it has ended, total = completed + failed."""

    total: int = Field(ge=0)
    """All."""
    completed: int = Field(ge=0)
    """That have their pictures."""
    failed: int = Field(ge=0)
    """That will not have any."""


class BatchObject(Answer):
    """A list of requests that is worked off."""

    id: str
    """Its name in the API."""
    object: Literal["batch"] = "batch"
    """What this is."""
    endpoint: Literal["/v1/images/generations"] = ENDPOINT
    """What its lines ask for."""
    errors: ListErrors | None = None
    """Why it has failed."""
    input_file_id: str
    """The list."""
    completion_window: Literal["24h"] = "24h"
    """What is not done by then is given up."""
    model: str
    """Name of the model."""
    status: BatchStatus
    """How far it is."""
    output_file_id: str | None = None
    """Answers, once it has ended; none where no line has one."""
    error_file_id: str | None = None
    """Lines without pictures and why, once it has ended; none where all have theirs."""
    created_at: int
    """Unix time in seconds, as all of them."""
    in_progress_at: int | None = None
    """The list was found right."""
    expires_at: int
    """It is given up."""
    finalizing_at: int | None = None
    """Its answers began to be written."""
    completed_at: int | None = None
    """It has ended as it should."""
    failed_at: int | None = None
    """It was refused, or could not be done."""
    expired_at: int | None = None
    """It was given up."""
    cancelling_at: int | None = None
    """It was asked to end."""
    cancelled_at: int | None = None
    """It has ended since it was asked to."""
    request_counts: RequestCounts
    """Its lines."""
    metadata: dict[str, str] | None = None
    """The client's own."""


class BatchList(Answer):
    """A page of batches, the newest first."""

    object: Literal["list"] = "list"
    """What this is."""
    data: tuple[BatchObject, ...]
    """The batches."""
    first_id: str | None = None
    """Of the first one."""
    last_id: str | None = None
    """Of the last one: `after` of the next page."""
    has_more: bool
    """Whether there is a next page."""


class FileRequest(Config):
    """Takes in a list."""

    purpose: Literal["batch"]
    """The one that there is."""


class BatchRequest(Config):
    """Has a list worked off."""

    input_file_id: str
    """A file that was uploaded with purpose batch."""
    endpoint: Literal["/v1/images/generations"]
    """What there are batches for."""
    completion_window: Literal["24h"]
    """The one that there is."""
    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=16)
    """The client's own, which comes back with the batch."""
