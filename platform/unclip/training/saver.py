"""Checkpoints that are written while training goes on.

A save costs the training a copy of this worker's slices into host memory. A thread writes, hashes and uploads them and hands
in its entry of the manifest; worker 0's thread commits the manifest once it has all entries, then deletes old checkpoints.
Entries and outcomes travel through the key-value store of the process group, which knows no collective calls: a
worker whose disk is full, or that is gone, costs the save, not the training.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from unclip.training import checkpoint
from unclip.training.checkpoint import CheckpointError, HostMemory, SaveError, Snapshot

if TYPE_CHECKING:
    from unclip.training.engine import Engine

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.25
_GRACE_S = 5.0
"""How much longer than `limit_s` worker 0 waits for its own thread, so that it says who was late; others wait twice that.
Of a short limit it is a quarter."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveOutcome:
    """How one save ended."""

    step: int
    seconds: float
    """From the copy to the commit."""
    bytes: int
    """In the files of all workers; 0 where the save failed."""
    error: str | None
    """Why there is no checkpoint of this step."""


@dataclass(frozen=True)
class _Save:
    """One attempt, on one worker."""

    attempt: str
    uri: str
    step: int
    started: float


class Saver:
    """Writes the checkpoints of a run; every worker has one, and calls the collective methods with the same arguments.

    Args:
        checkpoints_uri: the run's folder of checkpoints.
        engine: what is saved.
        facts: JSON values that every manifest holds as `run`: `config`, `versions`, `seed`.
        keep_last: newest checkpoints that are kept.
        keep_every_steps: checkpoints of these steps and their multiples are kept for good.
        limit_s: longest time that a save may take; nothing here waits more than 10 s longer for it.

    Creating it is collective too: worker 0 deletes what interrupted saves have left before anyone goes on. Raises
    `SaveError` on every worker where it cannot.
    """

    def __init__(
        self,
        checkpoints_uri: str,
        engine: Engine,
        *,
        facts: Mapping[str, Any],
        keep_last: int,
        keep_every_steps: int | None,
        limit_s: float,
    ) -> None:
        self._checkpoints_uri, self._engine, self._facts = checkpoints_uri, engine, dict(facts)
        self._keep_last, self._keep_every_steps = keep_last, keep_every_steps
        self._limit_s = limit_s
        self._store = dist.distributed_c10d._get_default_store()
        self._memory = HostMemory()
        self._threads: list[threading.Thread] = []
        """That live, and the last one; more than one where a storage hangs."""
        self._save: _Save | None = None
        self._outcomes: list[SaveOutcome] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._session, self._count = self._begin(), 0

    def start(self, state: Mapping[str, Any], *, objective: Mapping[str, torch.Tensor] | None) -> None:
        """Begins to save the training state of all workers, and `state` (JSON values, `step` among them). Collective.

        Waits for the save under way, copies this worker's slices to host memory, and returns. What goes wrong later costs
        this checkpoint and is told by `finished` and `wait`. `objective`: named tensors, the same on all workers.
        """
        self._outcome()
        started = time.monotonic()
        self._threads = [thread for thread in self._threads if thread.is_alive()]  # it still reads the host memory
        snapshot = None if self._threads else self._memory.snapshot(self._engine, state, objective)
        self._count += 1
        step = int(state["step"])
        uri = checkpoint.folder(self._checkpoints_uri, step)
        self._save = save = _Save(f"{self._session}-{self._count}", uri, step, started)
        self._threads.append(threading.Thread(target=self._run, args=(save, snapshot), name="checkpoint", daemon=True))
        self._threads[-1].start()

    def finished(self) -> list[SaveOutcome]:
        """On worker 0 the saves that have ended since the last call, oldest first; on others nothing. Never waits."""
        with self._lock:
            outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def wait(self) -> None:
        """Waits until what was started last is a checkpoint. Collective.

        Raises `SaveError` on every worker where it does not become one: with the error of the worker that failed,
        or naming those that did not deliver within `limit_s`.
        """
        error = self._outcome()
        if error is not None:
            raise SaveError(error)

    def close(self) -> None:
        """Waits for nothing: what is not committed is left for the next start to delete."""
        self._closed.set()

    def _begin(self) -> str:
        """A name for this Saver's saves, from worker 0, which has tidied up by then."""
        answer: list[str | None] = [None, None]
        if self._engine.rank == 0:
            try:
                checkpoint.collect(self._checkpoints_uri, self._keep_last, self._keep_every_steps)
                answer = [checkpoint.new_attempt(), None]
            except (OSError, CheckpointError) as error:
                answer = [None, f"rank 0 cannot tidy up {self._checkpoints_uri}: {error}"]
        dist.broadcast_object_list(answer, src=0)
        session, problem = answer
        if session is None:
            raise SaveError(problem)
        return session

    def _outcome(self) -> str | None:
        """The error of the save that was started last, when that has ended; None where it succeeded or there is none."""
        save = self._save
        if save is None:
            return None
        thread = self._threads[-1]
        grace = min(_GRACE_S, self._limit_s / 4)
        limit = self._limit_s + (grace if self._engine.rank == 0 else 2 * grace)
        deadline = time.monotonic() + limit
        thread.join(limit)
        if thread.is_alive():
            return f"checkpoint of step {save.step}: rank {self._engine.rank} is still busy with it after {limit:.0f} s"
        text = self._poll(f"{save.attempt}/outcome", deadline)
        if text is None:
            return f"checkpoint of step {save.step}: rank 0 has not said within {limit:.0f} s whether it is committed"
        error: str | None = json.loads(text)
        return error

    def _run(self, save: _Save, snapshot: Snapshot | None) -> None:
        """What the thread does."""
        rank = self._engine.rank
        try:
            if snapshot is None:
                raise TimeoutError("it still writes the checkpoint before")
            answer: dict[str, Any] = {"entry": snapshot.write(save.uri, save.attempt)}
        except Exception as error:
            answer = {"error": f"rank {rank} could not write its part: {type(error).__name__}: {error}"}
        try:
            self._store.set(f"{save.attempt}/{rank}", json.dumps(answer))
            if rank == 0:
                self._finish(save, snapshot)
        except Exception as error:  # the store is rank 0's: where it is gone, so is the run
            _log.warning("checkpoint of step %d: rank %d cannot reach the others: %s", save.step, rank, error)

    def _finish(self, save: _Save, snapshot: Snapshot | None) -> None:
        """Worker 0: commits, or not; then tells everyone."""
        outcome = SaveOutcome(save.step, 0.0, 0, None)
        try:
            entries = self._entries(save)
            assert snapshot is not None  # its own entry is among them
            if self._save is not save:  # given up, and what others wrote may be collected by now
                raise CheckpointError(f"it has taken longer than {self._limit_s:.0f} s")
            checkpoint.commit(save.uri, snapshot, entries, self._facts)
            outcome = replace(outcome, bytes=sum(entry["bytes"] for entry in entries))
        except Exception as error:
            outcome = replace(outcome, error=f"checkpoint of step {save.step}: {error}")
        try:
            checkpoint.collect(self._checkpoints_uri, self._keep_last, self._keep_every_steps)
        except (OSError, CheckpointError) as error:
            _log.warning("old checkpoints in %s cannot be deleted: %s", self._checkpoints_uri, error)
        with self._lock:
            self._outcomes.append(replace(outcome, seconds=time.monotonic() - save.started))
        self._store.set(f"{save.attempt}/outcome", json.dumps(outcome.error))

    def _entries(self, save: _Save) -> list[dict[str, Any]]:
        """The entries of all workers in the order of their ranks; raises `CheckpointError` where one has none."""
        answers: list[dict[str, Any] | None] = []
        for rank in range(self._engine.world_size):
            text = self._poll(f"{save.attempt}/{rank}", save.started + self._limit_s)
            answers.append(None if text is None else json.loads(text))
            with suppress(RuntimeError):  # stores that are files keep everything
                self._store.delete_key(f"{save.attempt}/{rank}")
        if errors := [answer["error"] for answer in answers if answer and "error" in answer]:
            raise CheckpointError("; ".join(errors))
        if missing := [str(rank) for rank, answer in enumerate(answers) if answer is None]:
            raise CheckpointError(
                f"rank {', '.join(missing)} delivered nothing within {self._limit_s:.0f} s; it is gone, or its storage hangs"
            )
        return [answer["entry"] for answer in answers if answer]

    def _poll(self, key: str, deadline: float) -> str | None:
        """The value of a key that another worker sets, and that is read once; None where it is not there in time."""
        pause = _SHORTEST_PAUSE_S
        while not self._store.check([key]):
            if self._closed.is_set() or time.monotonic() > deadline:
                return None
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        text: str = self._store.get(key).decode()
        return text
