"""One driver a folder: two that wrote into the same one would take each other's files away.

A file names the driver and is written anew every few seconds. A driver that finds another's takes over at once where that
one ran on this machine and is gone; else it looks whether the file still changes, and refuses if it does. So clocks of
different machines need not agree. Where two start in the same instant, the one that wrote first notices the other and ends.
The workers of a driver that is killed are ended by Ray.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
import uuid
from types import TracebackType
from typing import Any, NoReturn, Self

import psutil

from unclip.cluster.failures import RunFailed
from unclip.config.base import ConfigError
from unclip.utils import storage

_log = logging.getLogger(__name__)

BEAT_S = 10.0
SILENT_BEATS = 2.5
"""Beats without a sign after which a driver on another machine counts as gone."""


class Lease:
    """Held while the block runs; `check` raises `RunFailed` once another driver has taken over.

    Raises `ConfigError` at its start where another driver is at work.

    Args:
        uri: address of the file.
        what: the driver works at, as errors name it: the setting and its value.
    """

    def __init__(self, uri: str, what: str) -> None:
        self._uri = uri
        self._what = what
        process = psutil.Process()
        self._driver: dict[str, Any] = {
            "driver": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": process.pid,
            "started": process.create_time(),
        }
        self._beats = 0
        self._taken_by: str | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> Self:
        holder = self._read()
        if holder is not None:
            self._wait_for_end_of(holder)
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if self._taken_by is None:
            try:
                storage.remove(self._uri)
            except OSError as failed:  # the next driver finds out that this one is gone
                _log.warning(f"{self._uri} is left behind: {failed}")

    def check(self) -> None:
        """Raises `RunFailed` where the work is another driver's by now."""
        if self._taken_by is not None:
            raise RunFailed(f"{self._what} was taken over by {self._taken_by}: this driver ends")

    def _wait_for_end_of(self, holder: dict[str, Any]) -> None:
        if holder["host"] == socket.gethostname():
            if _lives_here(holder):
                self._refuse(holder)
            return
        limit = SILENT_BEATS * BEAT_S
        _log.warning(f"{self._what}: {_name(holder)} began it; waiting {limit:.0f} s for a sign of it")
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            time.sleep(min(1.0, BEAT_S / 4))
            now = self._read()
            if now is None:
                return
            if now != holder:
                self._refuse(now)

    def _refuse(self, holder: dict[str, Any]) -> NoReturn:
        raise ConfigError(f"{self._what} is being worked at by {_name(holder)}: one driver at a time")

    def _keep(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                holder = self._read()
                if holder is not None and holder["driver"] != self._driver["driver"]:
                    self._taken_by = _name(holder)
                    return
                self._write()
            except OSError:  # the store will answer again, to this driver as to any other
                continue

    def _read(self) -> dict[str, Any] | None:
        try:
            holder = storage.read_json(self._uri)
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return dict(holder)

    def _write(self) -> None:
        self._beats += 1
        storage.write_json(self._uri, self._driver | {"beat": self._beats})


def _lives_here(holder: dict[str, Any]) -> bool:
    try:
        return bool(abs(psutil.Process(holder["pid"]).create_time() - holder["started"]) < 1.0)
    except psutil.NoSuchProcess:
        return False


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}"
