"""A profile of some steps of a run, on request: `RUN/profile.json` asks for it, `RUN/profiles/` receives it."""

from __future__ import annotations

import json
import logging
import tempfile
import threading
from pathlib import Path
from typing import Self

import torch
from pydantic import Field

from unclip.config.base import Config, ConfigError
from unclip.training.run_folder import RunFolder
from unclip.utils import storage

_LOOK_EVERY_S = 2.0
_TABLE_ROWS = 40
_LARGEST_REQUEST = 1024

_logger = logging.getLogger(__name__)


class ProfileRequest(Config):
    """What `RUN/profile.json` holds."""

    steps: int = Field(default=5, gt=0, le=100)
    """Steps that are recorded, from the next one on; a trace has some megabytes a step."""


class ProfileConfig(ProfileRequest):
    """What asks a run for a profile."""

    run: str = Field(min_length=1)
    """Run folder of a run that trains, or will; local or `s3://`."""


def request_profile(config: ProfileConfig) -> str:
    """Asks the run for a profile; returns the folder that receives it. A request that is still open is replaced.

    Raises `ConfigError` where there is no run, `OSError` where the request cannot be written.
    """
    run = RunFolder(config.run)
    if not storage.exists(storage.join(run.uri, "config.json")):
        raise ConfigError(f"run = {config.run!r} holds no run")
    storage.write_json(run.profile_request_uri, ProfileRequest(steps=config.steps).to_dict())
    return run.profiles_uri


class ProfileRequests:
    """Worker 0's eye on `RUN/profile.json`: looks once at the start, then every few seconds in a thread. Takes what it finds."""

    def __init__(self, run: RunFolder) -> None:
        self._uri = run.profile_request_uri
        self._steps = 0
        self._closed = threading.Event()
        self._look()
        self._thread = threading.Thread(target=self._watch, name="profile-requests", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._closed.set()

    def take(self) -> int:
        """Steps that were asked for since the last call; 0 for none."""
        steps, self._steps = self._steps, 0
        return steps

    def _watch(self) -> None:
        while not self._closed.wait(_LOOK_EVERY_S):
            self._look()

    def _look(self) -> None:
        try:
            size = storage.size(self._uri)
            if size is None:
                return
            content = storage.read_bytes(self._uri) if size <= _LARGEST_REQUEST else b""
            storage.remove(self._uri)
            self._steps = ProfileRequest.from_dict(json.loads(content)).steps
        except OSError as error:  # the store is away; there is another look
            _logger.warning("no look at %s: %s", self._uri, error)
        except (ConfigError, ValueError, TypeError) as error:
            _logger.warning("%s is no request for a profile: %s", self._uri, error)


class Profiler:
    """One worker's profile of a window of steps. All workers begin in the same step, so that their traces can be compared."""

    def __init__(self, run: RunFolder, rank: int, device: torch.device) -> None:
        self._run, self._rank, self._device = run, rank, device
        self._profile: torch.profiler.profile | None = None
        self._left = 0
        self._first_step = 0

    def begin(self, *, step: int, steps: int) -> None:
        """Records `steps` steps, of which `step` is the first; one under way is left to end as it was asked for."""
        if self._profile is not None:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._first_step, self._left = step, steps
        self._profile = torch.profiler.profile(activities=activities, record_shapes=True)
        self._profile.start()

    def step(self) -> None:
        """A step has ended; writes the profile after the last one. A store that fails costs the profile, not the run."""
        if self._profile is None:
            return
        self._left -= 1
        if self._left == 0:
            self.end()

    def end(self) -> None:
        """Writes what was recorded: `step-00000100-rank-00000.json.gz` for chrome://tracing and Perfetto, and a `.txt` table."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        profile.stop()
        target = storage.join(self._run.profiles_uri, f"step-{self._first_step:08d}-rank-{self._rank:05d}")
        by = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        try:
            with tempfile.TemporaryDirectory(prefix="unclip-") as folder:
                trace = Path(folder) / "trace.json.gz"
                profile.export_chrome_trace(str(trace))
                storage.write_bytes(f"{target}.json.gz", trace.read_bytes())
            table = profile.key_averages().table(sort_by=by, row_limit=_TABLE_ROWS)
            storage.write_bytes(f"{target}.txt", f"{table}\n".encode())
        except OSError as error:
            _logger.warning("the profile of step %d is lost: %s", self._first_step, error)
