"""What is known of a run's restarts: why, how often, when it is enough, and the lines of `RUN/restarts.jsonl`.

A group of workers ends in one of three ways:
- finished: its answer is the run's summary;
- stopped by `ClusterSignals`, after a checkpoint: nodes will be taken away (preemption), or there is room for more (resize);
- dead: a worker was killed or raised, a node was lost, the store or the cluster did not answer. That is a failure, unless
  the node had been announced to go (preemption).
Failures in a row, without a newer checkpoint between them, are counted against `resources.max_failures`; a run of months may
have many more. The pauses before the next group grow: a store that is away for a minute ends no run.
What would come again (`failures.FINAL`) ends a run at once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from unclip.cluster.failures import RunFailed, describe, is_final, is_preemption
from unclip.cluster.group import Group
from unclip.cluster.preflight import PreflightError
from unclip.cluster.signals import PREEMPTION
from unclip.training import checkpoint
from unclip.training.run_folder import RunFolder
from unclip.training.watchdog import describe_stalls, read_stalls
from unclip.utils import storage

PAUSES_S = (1.0, 15.0, 60.0)
"""Before the next group after the first, second and every further failure in a row."""

_log = logging.getLogger(__name__)

Kind = Literal["failure", "preemption", "resize"]


@dataclass(frozen=True)
class _End:
    """Of a group that was not the last."""

    kind: Kind
    reason: str
    at: float
    """`time.monotonic`."""


class Restarts:
    """Of one run, as long as one driver trains it.

    Args:
        run: the folder that gets the lines.
        stage: what messages begin with.
        max_failures: failures in a row after which there is another group.
    """

    def __init__(self, run: RunFolder, stage: str, max_failures: int) -> None:
        self._run = run
        self._stage = stage
        self._max_failures = max_failures
        self._step = 0
        self._failures = 0
        self._failed_from = -1
        self._last_end: _End | None = None
        self._line: dict[str, Any] | None = None

    def until_finished(self, run_group: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Calls `run_group`, which is one group of workers, until one has finished the run; returns its summary.

        A summary's `stopped` is why the group ended before the run was finished, None where it was. Raises `RunFailed`
        where a group ended in a way that no further one would mend, too often, or without room for another one;
        `PreflightError` where there is no room for the first one.
        """
        while True:
            try:
                summary = run_group()
            except RunFailed:
                raise
            except PreflightError as error:
                if self._last_end is None:
                    raise
                raise RunFailed(self._message(self._last_end.reason, f"Then {error}")) from error
            except Exception as error:
                self._after_failure(error)
                continue
            self._write({})
            reason = summary.pop("stopped")
            if reason is None:
                return summary
            self._end("preemption" if reason.startswith(PREEMPTION) else "resize", reason, "goes on")

    def newest_checkpoint(self) -> checkpoint.Checkpoint | None:
        """Where the next group goes on; also forgets what the one before it stalled for."""
        storage.remove(self._run.stalls_uri)
        newest = checkpoint.latest(self._run.checkpoints_uri)
        self._step = newest.step if newest else 0
        return newest

    def begin(self, world_size: int) -> None:
        """A group of so many workers starts."""
        if self._last_end is not None:
            self._line = {
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "step": self._step,
                "reason": self._last_end.reason,
                "world_size": world_size,
                "kind": self._last_end.kind,
            }

    def look(self, group: Group) -> None:
        """Called while a group lives: writes its line once it has done a step, since then is known what the restart took."""
        if self._line is not None and self._last_end is not None and group.has_stepped():
            self._write({"seconds": round(time.monotonic() - self._last_end.at, 2)})

    def _after_failure(self, error: Exception) -> None:
        """Of a group that has died, or never came to life: returns after a pause, or raises `RunFailed`."""
        self._write({})
        reason = self._explain(error)
        if is_final(error):
            raise RunFailed(self._message(reason, "Starting again would end the same way")) from error
        if is_preemption(error):
            self._end("preemption", reason, "goes on")
            return
        if self._step > self._failed_from:
            self._failures = 0
        self._failed_from = self._step
        self._failures += 1
        if self._failures > self._max_failures:
            counted = f"resources.max_failures = {self._max_failures}, and there is no newer checkpoint since the last"
            raise RunFailed(self._message(reason, counted)) from error
        pause = PAUSES_S[min(self._failures, len(PAUSES_S)) - 1]
        self._end("failure", reason, f"failure {self._failures} of {self._max_failures}, goes on in {pause:.0f} s")
        time.sleep(pause)

    def _end(self, kind: Kind, reason: str, what_now: str) -> None:
        self._last_end = _End(kind, reason, time.monotonic())
        _log.warning(f"{self._stage}: {reason}; {what_now}")

    def _write(self, further: dict[str, Any]) -> None:
        """The line of the present group, once. A store that does not take it must not end the run."""
        line, self._line = self._line, None
        if line is not None:
            try:
                self._run.append(self._run.restarts_uri, line | further)
            except OSError as error:
                _log.warning(f"{self._run.restarts_uri} lacks {line | further}: {error}")

    def _explain(self, error: Exception) -> str:
        reason = describe(error)
        with suppress(OSError):
            reason += "".join(f" ({text})" for text in [describe_stalls(read_stalls(self._run))] if text)
        return reason

    def _message(self, reason: str, why: str) -> str:
        try:
            newest = checkpoint.latest(self._run.checkpoints_uri)
        except (OSError, checkpoint.CheckpointError) as error:
            stands = f"where {self._run.checkpoints_uri} says, which cannot be read now ({error})"
        else:
            stands = (
                f"at step {newest.step} ({newest.uri})" if newest else "at its beginning: there is no checkpoint yet"
            )
        return f"{reason}\n  {why}.\n  The run stands {stands}; the same command goes on from there"
