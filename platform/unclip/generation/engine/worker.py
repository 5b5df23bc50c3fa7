"""An engine that works in a thread of its own, for servers and for jobs that feed it."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType
from typing import Self

from unclip.generation.engine.engine import Engine
from unclip.generation.engine.metrics import EngineMetrics
from unclip.generation.engine.request import EngineFullError, EngineStoppedError, Request, Ticket

_LOGGER = logging.getLogger(__name__)

_LAST_STEP_SECONDS = 60.0
"""How long closing waits for the step that is being taken: far longer than any that ends."""


class EngineThread:
    """Steps `engine` as long as it has work; as a context manager it closes at the end. Nobody else may step it.

    Whatever happens, every ticket ends: where the thread dies, all that are under way raise `EngineStoppedError` with what
    it died of as `__cause__`, and so does whoever comes later.

    Args:
        max_waiting: requests that may wait for a slot, in whichever stage, when another one comes; it is refused.
    """

    def __init__(self, engine: Engine, *, max_waiting: int = 256) -> None:
        if max_waiting < 1:
            raise ValueError(f"max_waiting = {max_waiting}: must be at least 1")
        self._engine, self._max_waiting = engine, max_waiting
        self._changed = threading.Condition()
        self._closing = False
        self._end: EngineStoppedError | None = None
        self._metrics = engine.metrics()
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._work, name="unclip-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, *, patience: float = 0.0) -> Ticket:
        """Takes a request on, waiting `patience` seconds at most for there to be room.

        Raises `EngineFullError` where there was none, `EngineStoppedError` where the engine does not run any more, and
        what `Engine.submit` raises.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or self._engine.waiting < self._max_waiting, patience)
            if self._is_over:
                raise self._end or EngineStoppedError("the engine is closing")
            if self._engine.waiting >= self._max_waiting:
                raise EngineFullError(f"{self._max_waiting} requests wait already, which is max_waiting")
            ticket = self._engine.submit(request)
            self._changed.notify_all()
        return ticket

    def metrics(self) -> EngineMetrics:
        """As of the last step."""
        return self._metrics

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken on."""
        return not self._is_over

    @property
    def step_seconds(self) -> float:
        """How long the step that is being taken has taken up to now: a device that hangs shows here. 0 between steps."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def close(self, *, patience: float = 0.0) -> None:
        """Takes nothing on any more, waits `patience` seconds at most for what is under way, and ends the rest.

        A step that does not end within `_LAST_STEP_SECONDS` is left to itself: every ticket ends all the same.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._end is not None or not self._engine.has_work, patience)
            self._end = self._end or EngineStoppedError("the engine was closed")
            self._changed.notify_all()
        self._thread.join(_LAST_STEP_SECONDS)
        if self._thread.is_alive():
            _LOGGER.error("the engine's step has taken %.0f s: left to itself", self.step_seconds)
            self._engine.give_up(self._end)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _is_over(self) -> bool:
        return self._closing or self._end is not None

    def _work(self) -> None:
        try:
            while self._wait_for_work():
                self._step_began = time.monotonic()
                self._engine.step()
                self._step_began = None
                self._publish()
        except BaseException as error:
            _LOGGER.exception("the engine's thread died")
            self._end = EngineStoppedError(f"the engine's thread died: {error!r}")
            self._end.__cause__ = error
        finally:
            self._step_began = None
            with self._changed:
                self._end = self._end or EngineStoppedError("the engine was closed")
                self._engine.fail_all(self._end)
                self._metrics = self._engine.metrics()
                self._changed.notify_all()

    def _wait_for_work(self) -> bool:
        """Whether there is some; False when it is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._end is not None or self._engine.has_work)
            return self._end is None

    def _publish(self) -> None:
        """Between two steps, when nothing changes."""
        with self._changed:
            self._metrics = self._engine.metrics()
            self._changed.notify_all()
