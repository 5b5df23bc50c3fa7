"""A run in Weights & Biases."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

from unclip.training.config import TrainConfig
from unclip.training.reporting.config import WandbConfig
from unclip.training.reporting.mirror import MirroredFolder
from unclip.training.reporting.run_tail import News, Record
from unclip.training.reporting.view import run_id, train_scalars, validation_scalars
from unclip.utils import storage


class WandbView:
    """The same run there for every driver that continues it: its id is a hash of the run folder's address.

    Metrics have axes of their own, `train/step` and `validation/step`, since validations arrive late; what the
    service holds already is not sent again.
    """

    name = "Weights & Biases"

    def __init__(self, config: WandbConfig) -> None:
        self._config = config

    def open(self, config: TrainConfig) -> None:
        import wandb  # here, since only runs that are configured so need it

        self._wandb = wandb
        address = storage.absolute(config.run)
        self._folder = MirroredFolder(address)  # the library makes the folder wandb in it
        self._run = wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            mode=self._config.mode,
            id=run_id(config),
            name=address.rsplit("/", 1)[-1],
            resume="allow",
            dir=str(self._folder.path),
            config=config.to_dict(),
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
        )
        for group in ("train", "time"):
            self._run.define_metric(f"{group}/*", step_metric="train/step")
        self._run.define_metric("validation/*", step_metric="validation/step")
        self._shown = self._run.summary.get("train/step", -1)
        self._restarts = 0
        self._validated = self._run.summary.get("validation/step", -1)

    def show(self, news: News) -> None:
        for record in news.records:
            if record["step"] > self._shown:
                self._run.log(train_scalars(record) | {"train/step": record["step"]})
        for record in news.validations:
            if record["step"] > self._validated:
                self._run.log(self._validation(record) | {"validation/step": record["step"]})
        if news.restarts:
            self._restarts += len(news.restarts)
            self._run.summary["restarts"] = self._restarts

    def close(self) -> None:
        self._run.finish()
        self._wandb.teardown()  # its process still writes to the folder when `finish` returns
        self._folder.close()

    def _validation(self, record: Record) -> dict[str, Any]:
        values: dict[str, Any] = dict(validation_scalars(record))
        if record["samples"] is not None:
            picture = Image.open(io.BytesIO(storage.read_bytes(record["samples"])))
            values["validation/samples"] = self._wandb.Image(picture)
        return values
