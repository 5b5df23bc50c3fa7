"""Gauges that last: Ray drops one that has not been set for twenty seconds, however long its process lives."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import ray
from ray.util.metrics import Gauge

REPEAT_S = 5.0


class LastingGauges:
    """Each gauge has the value that it was given last until `close`, or until this process ends."""

    def __init__(self) -> None:
        self._values: dict[tuple[Gauge, tuple[tuple[str, str], ...]], float] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        threading.Thread(target=self._repeat, name="gauges", daemon=True).start()

    def set(self, gauge: Gauge, value: float, tags: Mapping[str, str]) -> None:
        """The gauge has that value for these tags from now on."""
        with self._lock:
            self._values[gauge, tuple(tags.items())] = value
            gauge.set(value, tags=dict(tags))

    def close(self) -> None:
        """Ray drops all of them, soon."""
        self._closed.set()

    def _repeat(self) -> None:
        while not self._closed.wait(REPEAT_S):
            with self._lock:
                for (gauge, tags), value in self._values.items() if ray.is_initialized() else ():
                    gauge.set(value, tags=dict(tags))
