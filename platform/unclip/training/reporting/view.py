"""What a view of a run is, and the names that all views give to what they show."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Protocol

from unclip.training.config import TrainConfig
from unclip.training.reporting.run_tail import News, Record
from unclip.utils import storage

BUCKET = re.compile(r"(.+)_t(\d+)-(\d+)")
"""A metric of a range of timesteps, as `loss_t000-099`."""


class View(Protocol):
    """Shows a run. All calls come from one thread of its own: a view may wait, and fail, without harming anything."""

    name: str
    """What it is called where it has to be switched off."""

    def open(self, config: TrainConfig) -> None:
        """Gets ready; called once, before everything else."""

    def show(self, news: News) -> None:
        """Shows what came; the first news of a run that is continued begin at its first step."""

    def close(self) -> None:
        """Finishes what is under way."""


def run_id(config: TrainConfig) -> str:
    """16 hexadecimal digits that only this run folder has, the same in every driver that continues the run."""
    return hashlib.sha256(storage.absolute(config.run).encode()).hexdigest()[:16]


def train_scalars(record: Record) -> dict[str, float]:
    """The finite numbers of a record of metrics: `time/PHASE` for the shares of time, else `train/NAME`."""
    return _finite({_train_name(key): value for key, value in record.items() if key != "step"})


def validation_scalars(record: Record) -> dict[str, float]:
    """The finite numbers of a validation, as `validation/NAME`."""
    return _finite({f"validation/{name}": value for name, value in record["metrics"].items()})


def _train_name(key: str) -> str:
    return f"time/{key.removeprefix('time_')}" if key.startswith("time_") else f"train/{key}"


def _finite(values: Mapping[str, object]) -> dict[str, float]:
    return {
        name: float(value) for name, value in values.items() if isinstance(value, int | float) and math.isfinite(value)
    }
