"""What goes wrong behind the API, as clients are told it."""

from __future__ import annotations

from unclip.config.base import ConfigError
from unclip.generation.engine.request import DeadlineError, EngineFullError
from unclip.pipelines.bundle import BundleError
from unclip.serving import context
from unclip.serving.errors import ApiError, Failed, InvalidRequest, Overloaded, TimedOut
from unclip.serving.groups import GroupUnavailableError, UnknownRevisionError

_RETRY_S = 2


def as_api_error(error: BaseException) -> ApiError:
    """Of several errors that happened together the first; what nobody foresaw names the request and nothing of the inside."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    match error:
        case ApiError():
            return error
        case ConfigError() | BundleError():  # what planning could not know
            return InvalidRequest(str(error), code="unsupported")
        case EngineFullError():
            return Overloaded("as many pictures wait as may wait", retry_after=_RETRY_S)
        case GroupUnavailableError() | UnknownRevisionError():
            return Overloaded("a part of the server is not there right now", retry_after=_RETRY_S)
        case DeadlineError() | TimeoutError():
            return TimedOut("the request was not done in its time")
    return Failed(f"the server failed at request {context.current().request_id}", code="internal_error")
