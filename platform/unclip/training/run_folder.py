"""The run folder: configuration, versions and everything that a training run tells about itself, each file under one name.

    RUN/config.json  versions.json  summary.json   what it is, what it ran with, what it came to
        metrics.jsonl  progress.json               a record a log window; the newest of them
        skipped.jsonl                              steps that changed nothing, with the records of their batches
        validation.jsonl  samples/                 held-out losses and sample grids, by a process of their own
        restarts.jsonl                             what ended a group of workers before the run was over
        stalls/rank-00001.json                     what workers waited for when they had waited too long
        profile.json  profiles/                    a request for a profile; traces and tables
        cost.json                                  hours that it has claimed, written anew by its driver (cluster/cost.py)
        driver.json                                who trains it now, written anew every ten seconds (cluster/lease.py)
        checkpoints/

A run that goes on from a checkpoint does again what came behind it, so the records of steps repeat: those written last count.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from unclip.config.base import ConfigError
from unclip.training.clock import Clock
from unclip.training.config import LoopConfig, TrainConfig
from unclip.utils import storage

_PACKAGES = ("torch", "deepspeed", "ray", "open_clip_torch", "pyarrow", "numpy", "unclip")
_MAY_CHANGE = {
    "run": True,  # a folder may be moved
    "bundle": True,
    "data_identity": True,  # has a check, and a sentence, of its own
    "resources": True,
    "zero": True,
    "loop": {
        "max_steps",
        "microbatch_size",
        "time_limit_s",
        "log_every",
        "checkpoint_every_s",
        "keep_checkpoints",
        "keep_every_steps",
        "max_skipped_steps",
        "stall_limit_s",
    },
    "resume": True,
    "init_from": True,
    "validation": True,
    "reporting": True,
    "cost": True,
}
"""What a continued run may change without becoming another run: True for a whole section."""
_CHANGES_NOTHING = "activation_checkpointing"
"""A field of models, at several depths, that only trades time for memory."""


class RunFolder:
    """Reads and writes one run's files; `uri` may be local or on object storage."""

    def __init__(self, uri: str) -> None:
        self.uri = storage.absolute(uri)
        self.checkpoints_uri = storage.join(self.uri, "checkpoints")
        self.progress_uri = storage.join(self.uri, "progress.json")
        self.metrics_uri = storage.join(self.uri, "metrics.jsonl")
        self.skipped_uri = storage.join(self.uri, "skipped.jsonl")
        self.validation_uri = storage.join(self.uri, "validation.jsonl")
        self.samples_uri = storage.join(self.uri, "samples")
        self.restarts_uri = storage.join(self.uri, "restarts.jsonl")
        self.stalls_uri = storage.join(self.uri, "stalls")
        self.profile_request_uri = storage.join(self.uri, "profile.json")
        self.profiles_uri = storage.join(self.uri, "profiles")
        self.cost_uri = storage.join(self.uri, "cost.json")
        self.driver_uri = storage.join(self.uri, "driver.json")
        self._summary_uri = storage.join(self.uri, "summary.json")

    def check(self, config: TrainConfig) -> None:
        """Raises `ConfigError` naming what differs where the folder holds a run that `config` does not continue."""
        stored_uri = storage.join(self.uri, "config.json")
        if storage.exists(stored_uri):
            stored = storage.read_json(stored_uri)
            differences = _differences(stored, config.to_dict(), _MAY_CHANGE, "")
            differences.sort(key=lambda text: text.split(" ", 1)[0].count("."))  # what a run is called comes first
            differences += _other_records(stored, config)
            if differences:
                more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
                raise ConfigError(
                    f"run = {self.uri!r} holds another run: {'; '.join(differences[:5])}{more}. "
                    "Choose another run folder, or delete that one"
                )

    def open(self, config: TrainConfig) -> None:
        """Checks, then stores the configuration and the versions it runs with, for a run that is to be trained (further)."""
        self.check(config)
        storage.remove(self._summary_uri)  # of a shorter run
        storage.write_json(storage.join(self.uri, "config.json"), config.to_dict())
        storage.write_json(storage.join(self.uri, "versions.json"), versions())

    def append(self, uri: str, record: Mapping[str, Any]) -> None:
        """Adds a record to one of the run's `….jsonl` files. Each has one writer."""
        storage.append_line(uri, json.dumps(record))

    def lines(self, uri: str) -> list[dict[str, Any]]:
        """All records of one of the run's `….jsonl` files as they were written; empty where there is none."""
        return [json.loads(line) for line in storage.read_lines(uri)]

    def metrics(self) -> list[dict[str, Any]]:
        """The records of the run as it went, by step: a restart takes back what was logged behind its checkpoint."""
        return _as_it_went(self.lines(self.metrics_uri))

    def skipped(self) -> list[dict[str, Any]]:
        """The steps that changed nothing, as the run went."""
        return _as_it_went(self.lines(self.skipped_uri))

    def finish(self, summary: dict[str, Any]) -> None:
        """Stores what the run came to."""
        storage.write_json(self._summary_uri, summary)

    def summary(self) -> dict[str, Any] | None:
        """What a finished run stored; None where none has finished."""
        return storage.read_json(self._summary_uri) if storage.exists(self._summary_uri) else None

    def summary_of(self, loop: LoopConfig) -> dict[str, Any] | None:
        """The same where the run has come as far as `loop` asks; None where it is to go on."""
        summary = self.summary()
        if summary is None or not Clock(step=summary["step"], seconds=summary["seconds"]).finished(loop):
            return None
        return summary


def versions() -> dict[str, str]:
    """Versions of what a run depends on, and the git commit of the code where there is one."""
    found = {"python": platform.python_version(), "machine": platform.platform(), "git": _git_commit()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # shipped by a runtime environment, not installed
            found[name] = "not installed"
    return found


def _as_it_went(written: list[dict[str, Any]]) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for record in written:
        while records and records[-1]["step"] >= record["step"]:
            records.pop()
        records.append(record)
    return records


def _git_commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _differences(stored: Any, asked: Any, may_change: Any, path: str) -> list[str]:
    if may_change is True or stored == asked:
        return []
    if isinstance(stored, dict) and isinstance(asked, dict):
        found: list[str] = []
        for key in sorted((stored.keys() | asked.keys()) - {_CHANGES_NOTHING}):
            free = key in may_change if isinstance(may_change, set) else may_change.get(key, {})
            found += _differences(stored.get(key), asked.get(key), free or {}, f"{path}.{key}" if path else key)
        return found
    return [f"{path} was {_short(stored)}, is now {_short(asked)}"]


def _other_records(stored: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """The folders whose records are not those that the run began with."""
    before, now = stored.get("data_identity", []), config.data_identity
    return [
        f"data_identity: the records in {field} = {path!r} have changed since the run began"
        for (field, path), was, is_now in zip(config.data.paths.items(), before, now, strict=False)
        if was != is_now
    ]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
