"""Calls of groups that fail for reasons that may pass are made again, as long as the request has time."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

from unclip.generation.engine.request import DeadlineError, EngineFullError, EngineStoppedError, StageFailedError
from unclip.serving.errors import Overloaded
from unclip.serving.groups import GroupUnavailableError
from unclip.serving.observe.logs import event
from unclip.serving.observe.meters import Meters

T = TypeVar("T")

_PASSING = (GroupUnavailableError, EngineStoppedError, EngineFullError, StageFailedError)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0
_WITHOUT_TIMEOUT_S = 120.0
_RETRY_AFTER_S = 1
_LEAST_S = 1e-3


@dataclass(frozen=True)
class Patience:
    """Of one request.

    Args:
        until: end of its time, by `time.monotonic`.
        meters: told of calls that are made again.
    """

    until: float
    meters: Meters

    @classmethod
    def of(cls, timeout: float | None, meters: Meters) -> Patience:
        """From now on; two minutes for who gives no time."""
        return cls(time.monotonic() + (_WITHOUT_TIMEOUT_S if timeout is None else timeout), meters)

    @property
    def left(self) -> float:
        """Seconds, more than none."""
        return max(self.until - time.monotonic(), _LEAST_S)

    async def answer(self, group: str, ask: Callable[[], Awaitable[T]], *, may_refuse: bool) -> T:
        """What `ask` answers, which is asked again where it failed for a reason that may pass.

        A stage that fails twice fails for good: the first time the process may have been to blame.

        Args:
            may_refuse: a group that has too much to do raises `Overloaded`; otherwise it is waited for.
        """
        failed = False
        for attempt in count():
            try:
                return await ask()
            except _PASSING as error:
                if isinstance(error, EngineFullError) and may_refuse:
                    raise Overloaded("the server has too much to do", retry_after=_RETRY_AFTER_S) from error
                if isinstance(error, StageFailedError):
                    if failed:
                        raise
                    failed = True
                reason = error
            event("call_repeated", group=group, reason=type(reason).__name__)
            self.meters.count("unclip_serve_retries", group=group, reason=type(reason).__name__)
            await self.pause(attempt, reason)
        raise AssertionError("there is no end to counting")

    async def pause(self, attempt: int, error: Exception) -> None:
        """Waits longer from attempt to attempt, and not all for the same time; `DeadlineError` where none is left for it."""
        seconds = min(_FIRST_PAUSE_S * 2.0**attempt, _LONGEST_PAUSE_S) * random.uniform(0.5, 1)  # noqa: S311
        if seconds >= self.until - time.monotonic():
            raise DeadlineError(f"not done in time; the last failure was: {error}") from error
        await asyncio.sleep(seconds)
