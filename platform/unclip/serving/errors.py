"""Errors as clients are told them: those of OpenAI's API, with its types, codes and statuses."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A request that is refused or failed.

    Args:
        message: for people; it names the field and its value, and nothing that a client must not know.
        status: of the HTTP answer.
        kind: OpenAI's error type.
        code: OpenAI's error code, or one of ours.
        param: the field that is to blame.
        retry_after: whole seconds after which it is worth asking again.
    """

    status = 400
    kind = "invalid_request_error"

    def __init__(
        self, message: str, *, code: str | None = None, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.code, self.param, self.retry_after = message, code, param, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Of the answer."""
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}


class InvalidRequest(ApiError):
    """A field is missing, of another kind, or outside of what the model can do."""


class ContentRefused(ApiError):
    """The content policy forbids the prompt, or a picture that was given or made."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="content_policy_violation")


class Unauthorized(ApiError):
    """There is no API key, or one that nobody has been given."""

    status = 401

    def __init__(self, message: str) -> None:
        super().__init__(message, code="invalid_api_key")

    @property
    def headers(self) -> dict[str, str]:
        return {"www-authenticate": "Bearer"}


class NotFound(ApiError):
    """There is no such model, picture, file or batch."""

    status = 404


class TooLarge(ApiError):
    """The body, or a picture in it, is larger than the server reads."""

    status = 413


class RateLimited(ApiError):
    """The key's own limit is reached."""

    status = 429
    kind = "rate_limit_error"


class Overloaded(ApiError):
    """The server has as much to do as it takes on."""

    status = 503
    kind = "server_error"

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message, code="overloaded", retry_after=retry_after)


class TimedOut(ApiError):
    """The request was not done in the time that it had."""

    status = 504
    kind = "server_error"

    def __init__(self, message: str) -> None:
        super().__init__(message, code="timeout")


class Failed(ApiError):
    """Something broke that the client is not to blame for."""

    status = 500
    kind = "server_error"
