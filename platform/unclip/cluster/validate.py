"""Validation beside the training: one actor that reads checkpoints as they are committed and never stops anything."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from unclip.generation.outputs import captioned_grid, write_grid
from unclip.training import checkpoint
from unclip.training.checkpoint import Checkpoint
from unclip.training.config import TrainConfig
from unclip.training.run_folder import RunFolder
from unclip.training.setup import PreparedRun
from unclip.training.validation.log import ValidationLog
from unclip.training.validation.result import SampleGrid
from unclip.training.validation.validate import validate
from unclip.utils import storage

_LOGGER = logging.getLogger(__name__)

_POLL_S = 1.0
_MAX_RESTARTS = 3
"""Times that the actor is started again before the run goes on without validation."""


class Validator:
    """Validates a run's checkpoints while the block runs, where `validation.every_steps` asks for it.

    Due are the multiples of `every_steps`, and the run's last checkpoint. The newest one that is due is validated; those
    that came before it meanwhile are written down as missed, and so is one that is collected while it is read. Steps with
    a line in `validation.jsonl` are not validated again. A dead actor is started again; the block's end waits at most
    `validation.wait_s` for what is due, and not at all where it ends by an exception.
    """

    def __init__(self, prepared: PreparedRun) -> None:
        self._config = prepared.config
        self._checkpoints_uri = RunFolder(prepared.config.run).checkpoints_uri
        self._log = ValidationLog(RunFolder(prepared.config.run))
        self._newest = 0
        self._restarts = 0
        self._actor: Any = None
        self._ending = threading.Event()
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._watch, name="validator", daemon=True)

    def __enter__(self) -> Self:
        if self._config.validation.every_steps is not None:
            self._newest = self._log.newest_step()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._config.validation.every_steps is None:
            return
        self._deadline = time.monotonic() + (self._config.validation.wait_s if kind is None else 0.0)
        self._ending.set()
        self._thread.join()

    def _watch(self) -> None:
        try:
            while self._restarts <= _MAX_RESTARTS and (due := self._wait_for_due()) is not None:
                self._validate(due)
        except Exception as error:
            _LOGGER.warning("validation ends: %s: %s", type(error).__name__, error)
        finally:
            if self._actor is not None:
                ray.kill(self._actor)

    def _wait_for_due(self) -> Checkpoint | None:
        """The newest checkpoint that is due and not settled; None when the run has ended and there is none."""
        while True:
            is_ending = self._ending.is_set()  # before looking: what was committed until then is seen
            if time.monotonic() > self._deadline:
                return None
            due = self._find_due(is_ending)
            if due is not None or is_ending:
                return due
            self._ending.wait(_POLL_S)

    def _find_due(self, is_ending: bool) -> Checkpoint | None:
        every = self._config.validation.every_steps
        assert every is not None
        try:
            names = storage.names(self._checkpoints_uri)
            steps = [int(name[5:]) for name in names if re.fullmatch(r"step-\d+", name)]
            for step in sorted(steps, reverse=True):
                if step > self._newest and (is_ending or step % every == 0):
                    found = _open(checkpoint.folder(self._checkpoints_uri, step))
                    if found is not None:
                        return found
        except OSError as error:  # the store does not answer; it is asked again
            _LOGGER.warning("validation cannot look for checkpoints: %s", error)
        return None

    def _validate(self, due: Checkpoint) -> None:
        every = self._config.validation.every_steps
        assert every is not None
        if self._actor is None:
            self._actor = _start_actor(self._config)
        missed = range(self._newest - self._newest % every + every, due.step, every)
        answer = self._actor.validate.remote(due.uri, list(missed))
        while not ray.wait([answer], timeout=_POLL_S)[0]:
            if time.monotonic() > self._deadline:
                _LOGGER.warning("validation of step %d is not done within validation.wait_s", due.step)
                return
        try:
            failure: str | None = ray.get(answer)
        except RayActorError as error:
            self._restarts += 1
            self._actor = None
            again = "is started again" if self._restarts <= _MAX_RESTARTS else "is not started again"
            _LOGGER.warning("validation died at step %d and %s: %s", due.step, again, str(error).splitlines()[0])
            self._newest = self._log.newest_step()
            return
        except RayTaskError as error:  # not even that it failed could be written down
            failure = str(error.cause)
        self._newest = due.step
        if failure is not None:
            _LOGGER.warning("validation of step %d is missed: %s", due.step, failure)


class _Actor:
    """The process that validates; alone in writing `validation.jsonl` and `samples/`."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._run = RunFolder(config.run)
        self._log = ValidationLog(self._run)
        self._device = torch.device("cuda" if config.validation.gpus else "cpu")
        torch.set_num_threads(max(1, int(config.validation.cpus)))

    def validate(self, uri: str, missed: Sequence[int]) -> str | None:
        """Writes down the validation of a checkpoint, after the steps that were missed; a text where it failed."""
        started = time.monotonic()
        for step in missed:
            self._log.miss(step, "a newer checkpoint was there when the validation before had ended")
        step = int(uri.rsplit("-", 1)[1])
        try:
            found = checkpoint.open_committed(uri)
            if found is None:
                raise checkpoint.CheckpointError(f"{uri} is there no more")
            result = validate(self._config, found, self._device)
            samples = None if result.grid is None else self._draw(step, result.grid)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
            if not storage.exists(uri):
                failure = "the checkpoint was collected while it was read"
            self._log.miss(step, failure)
            return failure
        self._log.add(step, seconds=time.monotonic() - started, metrics=result.metrics, samples=samples)
        return None

    def _draw(self, step: int, grid: SampleGrid) -> str:
        """Writes the grid, and beside it what it is of; its address inside the run folder."""
        name = f"step-{step:08d}"
        stage = self._config.objective.stage_config()
        facts = {
            "step": step,
            "captions": [caption for caption, _ in grid.rows],
            "columns": list(grid.titles),
            "seed": self._config.validation.seed,
            "sampling": stage.to_dict().get("sampling"),
        }
        storage.write_json(storage.join(self._run.samples_uri, f"{name}.json"), facts)
        cell = max(picture.shape[0] for _, row in grid.rows for picture in row if picture is not None)
        page = captioned_grid(grid.rows, grid.titles, cell=min(256, max(128, cell)))
        write_grid(page, storage.join(self._run.samples_uri, f"{name}.png"))
        return f"samples/{name}.png"


def _open(uri: str) -> Checkpoint | None:
    """The checkpoint, where it is complete; one that is damaged is for the training to complain about."""
    try:
        return checkpoint.open_committed(uri)
    except checkpoint.CheckpointError:
        return None


def _start_actor(config: TrainConfig) -> Any:
    claim = config.validation
    labels = config.resources.node_labels if claim.gpus else {}
    actor: Any = ray.remote(num_cpus=claim.cpus, num_gpus=claim.gpus, label_selector=labels)(_Actor)
    return actor.remote(config)
