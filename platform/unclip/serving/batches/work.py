"""A batch worked off: its pictures made by the bulk job, watched and ended when it has to be, then the answers written.

Whoever does it may die at any time; another begins anew, and the bulk job goes on where it was.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

from unclip.generation.bulk.config import GenerateConfig
from unclip.generation.bulk.receipts import Receipt
from unclip.serving.batches.folder import BatchFolder, BatchState, Checked, Ended, Progress
from unclip.serving.batches.outputs import Unanswered, write_outputs
from unclip.serving.observe import logs
from unclip.serving.pictures.encoding import Encoder
from unclip.utils import storage

MOST_ATTEMPTS = 5
"""Attempts in a row that finish no unit, after which a batch ends with what is done."""
NOT_MADE = "the pictures could not be made; the server's log says why"
"""All that clients are told."""
LOOK_S = 2.0
_WAITS_S = (5.0, 300.0)


class JobRefusedError(RuntimeError):
    """The bulk job will never do what it is asked for."""


class Making(Protocol):
    """A bulk job under way."""

    def wait(self, seconds: float) -> bool:
        """Whether it is done by then. Raises `JobRefusedError`, or anything else where it makes sense to begin it anew."""
        ...

    def stop(self) -> None:
        """Ends it where it is not done; nothing that it has begun is done any more."""
        ...


class BatchWork:
    """Works off one batch.

    Args:
        begin: begins the bulk job.
        encoder: of the pictures that are handed out.
    """

    def __init__(
        self, folder: BatchFolder, batch_id: str, begin: Callable[[GenerateConfig], Making], encoder: Encoder
    ) -> None:
        self._folder, self._id = folder, batch_id
        self._begin, self._encoder = begin, encoder
        self._receipts: dict[str, Receipt] = {}
        self._progress: Progress | None = None

    def run(self) -> None:
        """To its end; nothing happens where it has ended already, or cannot begin. Raises `OSError` where the storage fails."""
        state = self._state()
        if state is None or state.checked is None or state.is_over:
            return
        error = None
        if state.rows:
            try:
                self._make(state)
            except JobRefusedError as refused:
                logs.event("batch_job_failed", level=logging.ERROR, batch=self._id, error=refused)
                error = NOT_MADE
        self._finish(error)

    def _make(self, state: BatchState) -> None:
        """Until all pictures are there, or no more shall be made. Raises `JobRefusedError`."""
        fruitless, wait_s = 0, _WAITS_S[0]
        while fruitless < MOST_ATTEMPTS:
            before = len(self._receipts)
            try:
                self._attempt(state.batch.job)
                return
            except JobRefusedError:
                raise
            except Exception as error:
                logs.event("batch_attempt_failed", level=logging.WARNING, batch=self._id, error=error)
                last = error
            self._report(state.checked)
            came_on = len(self._receipts) > before
            fruitless, wait_s = (0, _WAITS_S[0]) if came_on else (fruitless + 1, wait_s)
            if self._rest(wait_s):
                return
            wait_s = min(2 * wait_s, _WAITS_S[1])
        raise JobRefusedError(f"{MOST_ATTEMPTS} attempts in a row have finished nothing") from last

    def _attempt(self, job: GenerateConfig) -> None:
        making = self._begin(job)
        try:
            while not making.wait(LOOK_S):
                state = self._state()
                if state is None or _is_enough(state):
                    return
                self._report(state.checked)
        finally:
            making.stop()

    def _rest(self, seconds: float) -> bool:
        """Whether the batch shall end meanwhile."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(min(LOOK_S, seconds))
            state = self._state()
            if state is None or _is_enough(state):
                return True
        return False

    def _report(self, checked: Checked | None, finalizing_at: int | None = None) -> None:
        """Says how far the batch is, by the receipts of units."""
        folder = self._folder.batch_uri(self._id, "pictures/_units")
        for name in storage.names(folder):
            if name.endswith(".json") and name not in self._receipts:
                try:
                    self._receipts[name] = Receipt.from_dict(storage.read_json(storage.join(folder, name)))
                except (FileNotFoundError, ValueError):  # half of one, after a power cut: made again
                    continue
        refused = 0 if checked is None else checked.refused
        progress = Progress(
            completed=sum(receipt.done for receipt in self._receipts.values()),
            failed=refused + sum(sum(receipt.quarantined.values()) for receipt in self._receipts.values()),
            finalizing_at=finalizing_at,
        )
        if progress != self._progress:
            self._folder.write(self._id, progress)
            self._progress = progress

    def _finish(self, error: str | None) -> None:
        state = self._state()
        if state is None or state.is_over:  # of another cluster, which has taken the pictures away already
            return
        began = int(time.time())
        self._report(state.checked, finalizing_at=began)
        why: Unanswered = "failed" if error else state.reason_to_end or "failed"
        written = write_outputs(self._folder, state, why, self._encoder)
        ended = Ended(
            at=int(time.time()),
            status=why if written.unanswered else "completed",
            completed=written.completed,
            failed=written.failed,
            finalizing_at=began,
            output_file_id=written.output_file_id,
            error_file_id=written.error_file_id,
            error=error,
        )
        self._folder.write(self._id, ended)
        logs.event("batch_ended", batch=self._id, status=ended.status, completed=ended.completed, failed=ended.failed)
        self._clean()

    def _clean(self) -> None:
        """The answers hold the pictures."""
        try:
            storage.remove(self._folder.batch_uri(self._id, "pictures"))
        except OSError as error:  # a process that was stopped writes its last; nobody reads it
            logs.event("batch_pictures_stay", level=logging.WARNING, batch=self._id, error=error)

    def _state(self) -> BatchState | None:
        return self._folder.state(self._id)


def _is_enough(state: BatchState) -> bool:
    """Whether no more pictures shall be made."""
    return state.is_over or state.reason_to_end is not None
