"""No hang without an end and a reason: every worker says what it waits for, and a thread sees to the limit."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta

from unclip.training.run_folder import RunFolder
from unclip.utils import storage

STALLED = 75
"""Exit status of a worker that waited too long (EX_TEMPFAIL: trying again may help)."""
_GRACE_S = 5.0
"""From a stall's file to the worker's end, at most: workers that wait for each other write theirs meanwhile."""


@dataclass(frozen=True)
class Stall:
    """What a worker did when it had waited too long."""

    rank: int
    world_size: int
    step: int
    """Steps that the worker had finished."""
    waiting_for: str
    waited_s: float
    stack: str
    """Where in the code it waited."""
    time: str
    """When the limit was reached, by the clock of its node, UTC."""

    @property
    def sentence(self) -> str:
        """Who waited for what, and how long."""
        return f"rank {self.rank} waited {self.waited_s:.0f} s for {self.waiting_for}"

    @property
    def began(self) -> datetime:
        """When the wait began."""
        return datetime.fromisoformat(self.time) - timedelta(seconds=self.waited_s)


class Watchdog:
    """Ends this process with status `STALLED` where one of its `waiting` blocks lasts longer than `limit_s`.

    First it leaves `RUN/stalls/rank-00001.json` and writes the same to stderr, then gives the other workers some seconds
    to do likewise. Entering and leaving a block takes microseconds.
    """

    def __init__(self, run: RunFolder, *, rank: int, world_size: int, limit_s: float) -> None:
        self.step = 0
        """Steps finished, kept up to date by the loop."""
        self.limit_s = limit_s
        self._run, self._rank, self._world_size = run, rank, world_size
        self._wait: tuple[str, float, int] | None = None  # for what, since when, which thread; replaced in one go
        self._stalled = threading.Event()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """The block waits for `what`. Blocks may lie in each other: the inner one counts."""
        outer = self._wait
        self._wait = (what, time.monotonic(), threading.get_ident())
        try:
            yield
        finally:
            if self._stalled.is_set():  # another worker's end is no reason to die of an error that says less
                threading.Event().wait()
            self._wait = outer

    def close(self) -> None:
        """Ends the watch."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.limit_s / 10)):
            wait = self._wait
            if wait is not None and time.monotonic() - wait[1] > self.limit_s:
                self._stalled.set()
                self._end(*wait)

    def _end(self, what: str, since: float, thread: int) -> None:
        frame = sys._current_frames().get(thread)
        stall = Stall(
            rank=self._rank,
            world_size=self._world_size,
            step=self.step,
            waiting_for=what,
            waited_s=round(time.monotonic() - since, 3),
            stack="".join(traceback.format_stack(frame)) if frame else "",
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
        )
        sys.stderr.write(f"{stall.sentence}: it ends here\n{stall.stack}\n")
        sys.stderr.flush()
        # In a thread, since what hangs may be the storage.
        threading.Thread(target=self._store, args=(stall,), name="stall", daemon=True).start()
        time.sleep(min(_GRACE_S, self.limit_s))
        os._exit(STALLED)

    def _store(self, stall: Stall) -> None:
        storage.write_json(storage.join(self._run.stalls_uri, f"rank-{stall.rank:05d}.json"), asdict(stall))


def read_stalls(run: RunFolder) -> list[Stall]:
    """What workers left when they had waited too long, by rank."""
    files = [name for name in storage.names(run.stalls_uri) if name.endswith(".json")]
    return [Stall(**storage.read_json(storage.join(run.stalls_uri, name))) for name in files]


def describe_stalls(stalls: Sequence[Stall]) -> str:
    """`rank 1 waited 30 s for the batch of step 12; rank 0 waited 30 s for the gradients of step 12`, and who left no word.

    The one that began to wait first comes first: the others most likely wait for it. Empty without stalls.
    """
    parts = [stall.sentence for stall in sorted(stalls, key=lambda stall: stall.began)]
    world_size = max((stall.world_size for stall in stalls), default=0)
    silent = sorted(set(range(world_size)) - {stall.rank for stall in stalls})
    if silent:
        parts.append(f"no word of rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}")
    return "; ".join(parts)
