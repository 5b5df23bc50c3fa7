"""Worker 0's records on their way into the run folder. A store that fails delays them; training does not wait for it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Self

from unclip.training.run_folder import RunFolder
from unclip.utils import storage

_RETRY_S = 2.0
"""Between two attempts to write the same record."""
_FLUSH_LIMIT_S = 120.0
"""For what is left to be written when a run ends: a store that was away for a minute is back by then."""
_FLUSH_LIMIT_AFTER_ERROR_S = 10.0

_logger = logging.getLogger(__name__)


class MetricLog:
    """Writes `metrics.jsonl`, `progress.json` and `skipped.jsonl`, in the order of the calls, in a thread of its own.

    A context manager. The end of the block waits for what is left and raises `OSError` where that cannot be written in
    time; after an error in the block it waits shortly, and says nothing.
    """

    def __init__(self, run: RunFolder, *, retry_s: float = _RETRY_S, flush_limit_s: float = _FLUSH_LIMIT_S) -> None:
        self._run, self._retry_s, self._flush_limit_s = run, retry_s, flush_limit_s
        self._pending: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._write, name="metric-log", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        with self._changed:
            self._closing.set()
            self._changed.notify()
        self._thread.join(_FLUSH_LIMIT_AFTER_ERROR_S if kind else self._flush_limit_s)
        if self._pending and kind is None:
            reason = self._error or "the store does not answer"
            raise OSError(f"{len(self._pending)} records of {self._run.uri} could not be written: {reason}")

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Adds a line of metrics, then shows it as the run's progress."""
        self._put(partial(self._run.append, self._run.metrics_uri, record))
        self._put(partial(storage.write_json, self._run.progress_uri, record))

    def skipped(self, record: Mapping[str, Any]) -> None:
        """Adds a step that changed nothing."""
        self._put(partial(self._run.append, self._run.skipped_uri, record))

    def _put(self, write: Callable[[], None]) -> None:
        with self._changed:
            self._pending.append(write)
            self._changed.notify()

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closing.is_set())
            if not self._pending:
                return
            try:
                self._pending[0]()
            except OSError as error:
                if self._error is None:
                    _logger.warning("%s cannot be written (%s); its records wait in memory", self._run.uri, error)
                self._error = error
                time.sleep(self._retry_s)
                continue
            self._pending.popleft()
            self._error = None
