"""A run's progress on the driver's screen, from the file that its worker 0 keeps up to date."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from unclip.utils import storage

POLL_INTERVAL_S = 0.5
LINE_INTERVAL_S = 10.0


class ProgressWatcher:
    """Shows `progress.json` while the block runs: one bar on a terminal, elsewhere a line every 10 s.

    Args:
        progress_uri: the file; fields `step`, `max_steps`, `progress` (0 to 1), and if there `loss`,
            `images_per_second`, `eta_s`. It need not exist yet.
        title: what stands before it, the stage's name.
    """

    def __init__(self, progress_uri: str, title: str) -> None:
        self.uri = progress_uri
        self.title = title
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._shown: Mapping[str, Any] | None = None
        self._bar: tqdm[Any] | None = None
        self._last_line = float("-inf")

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            layout = "{desc} {percentage:3.0f}%|{bar}| {postfix}"
            self._bar = tqdm(total=1.0, desc=self.title, bar_format=layout, file=sys.stderr)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._show(is_last=True)
        if self._bar is not None:
            self._bar.close()

    def _watch(self) -> None:
        while not self._stop.wait(POLL_INTERVAL_S):
            self._show(is_last=False)

    def _show(self, *, is_last: bool) -> None:
        record = _read(self.uri)
        if record is None or record == self._shown:
            return
        if self._bar is not None:
            self._shown = record
            self._bar.set_postfix_str(describe(record), refresh=False)
            self._bar.n = min(1.0, float(record["progress"]))
            self._bar.refresh()
        elif is_last or time.monotonic() - self._last_line >= LINE_INTERVAL_S:
            self._shown = record
            self._last_line = time.monotonic()
            print(f"{self.title}: {100 * record['progress']:3.0f}% {describe(record)}", file=sys.stderr, flush=True)


def describe(record: Mapping[str, Any]) -> str:
    """`step 40/500, loss 0.1234, 52.1 images/s, 73 s left`: of those, what the record has."""
    parts = [f"step {record['step']}/{record['max_steps']}"]
    if "loss" in record:
        parts.append(f"loss {record['loss']:.4f}")
    if "images_per_second" in record:
        parts.append(f"{record['images_per_second']:.1f} images/s")
    if "eta_s" in record:
        parts.append(f"{record['eta_s']:.0f} s left")
    return ", ".join(parts)


def _read(uri: str) -> dict[str, Any] | None:
    """The record; None where there is none yet or the store does not answer, which only delays what is shown."""
    try:
        record = storage.read_json(uri)
    except (OSError, json.JSONDecodeError):
        return None
    return record if isinstance(record, dict) else None
