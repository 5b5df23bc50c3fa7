"""A run in TensorBoard: `RUN/tensorboard`."""

from __future__ import annotations

import io
import json
import time

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from unclip.training.config import TrainConfig
from unclip.training.reporting.mirror import MirroredFolder
from unclip.training.reporting.run_tail import News, Record
from unclip.training.reporting.view import train_scalars, validation_scalars
from unclip.utils import storage

PUSH_INTERVAL_S = 30.0
"""Seconds between two copies to a run folder on object storage."""
PART_RECORDS = 1000
"""Records in a file of events: what is copied again with each of them stays small."""


class TensorBoardView:
    """Scalars as `train/…`, `time/…`, `validation/…`, sample grids as pictures, configuration and restarts as text.

    The folder is written anew by each driver, from the first step on: what an earlier one had shown of steps that were
    trained again goes, and nothing is there twice.
    """

    name = "TensorBoard"

    def open(self, config: TrainConfig) -> None:
        uri = storage.join(storage.absolute(config.run), "tensorboard")
        storage.remove(uri)
        self._folder = MirroredFolder(uri)
        self._pushed = time.monotonic()
        self._records = 0
        self._writer = self._part()
        self._writer.add_text("config", _code(json.dumps(config.to_dict(), indent=2)), 0)

    def show(self, news: News) -> None:
        for record in news.restarts:
            self._writer.add_text("restarts", _code(json.dumps(record, indent=2)), record["step"])
        for record in news.records:
            self._record(record)
        for record in news.validations:
            self._validation(record)
        self._writer.flush()
        if time.monotonic() - self._pushed >= PUSH_INTERVAL_S:
            self._folder.push()
            self._pushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()
        self._folder.close()

    def _part(self) -> SummaryWriter:
        purge_step = None if self._records else 0  # a TensorBoard that is open forgets what the folder held before
        return SummaryWriter(str(self._folder.path), purge_step=purge_step, filename_suffix=f".{self._records:08d}")

    def _record(self, record: Record) -> None:
        if self._records and self._records % PART_RECORDS == 0:
            self._writer.close()
            self._writer = self._part()
        self._records += 1
        for name, value in train_scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def _validation(self, record: Record) -> None:
        for name, value in validation_scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])
        if record["samples"] is not None:
            with Image.open(io.BytesIO(storage.read_bytes(record["samples"]))) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            self._writer.add_image("samples", pixels, record["step"], dataformats="HWC")


def _code(text: str) -> str:
    """Markdown that shows the text as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines())
