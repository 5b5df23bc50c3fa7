"""A run in MLflow."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from unclip.training.config import TrainConfig
from unclip.training.reporting.config import MlflowConfig
from unclip.training.reporting.run_tail import News
from unclip.training.reporting.view import run_id, train_scalars, validation_scalars
from unclip.utils import storage

_TAG = "unclip.run_id"


class MlflowView:
    """The same MLflow run for every driver that continues it, found by a tag; what it holds already is not sent again."""

    name = "MLflow"

    def __init__(self, config: MlflowConfig) -> None:
        self._config = config

    def open(self, config: TrainConfig) -> None:
        if storage.is_local(self._config.tracking_uri):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # folders are refused without it
        import mlflow  # here, since only runs that are configured so need it

        self._client = mlflow.MlflowClient(tracking_uri=self._config.tracking_uri)
        self._id = self._find_or_create(config)
        values = self._client.get_run(self._id).data.metrics
        self._shown, self._validated = values.get("train/step", -1), values.get("validation/step", -1)
        self._restarts = 0

    def show(self, news: News) -> None:
        for record in news.records:
            if record["step"] > self._shown:
                self._log(train_scalars(record) | {"train/step": record["step"]}, record["step"])
        for record in news.validations:
            if record["step"] > self._validated:
                self._log(validation_scalars(record) | {"validation/step": record["step"]}, record["step"])
                if record["samples"] is not None:
                    self._picture(record["samples"])
        if news.restarts:
            self._restarts += len(news.restarts)
            self._client.set_tag(self._id, "restarts", self._restarts)

    def close(self) -> None:
        self._client.set_terminated(self._id)

    def _find_or_create(self, config: TrainConfig) -> str:
        experiment = self._client.get_experiment_by_name(self._config.experiment)
        where = experiment.experiment_id if experiment else self._client.create_experiment(self._config.experiment)
        found = self._client.search_runs([where], filter_string=f"tags.`{_TAG}` = '{run_id(config)}'", max_results=1)
        if found:
            self._client.update_run(found[0].info.run_id, status="RUNNING")
            return str(found[0].info.run_id)
        name = storage.absolute(config.run).rsplit("/", 1)[-1]
        run = self._client.create_run(where, run_name=name, tags={_TAG: run_id(config)})
        self._client.log_dict(run.info.run_id, config.to_dict(), "config.json")
        for key, value in (("stage", config.stage), ("recipe", config.recipe), ("seed", config.seed)):
            self._client.log_param(run.info.run_id, key, value)
        return str(run.info.run_id)

    def _log(self, values: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        self._client.log_batch(self._id, [Metric(name, value, now, step) for name, value in values.items()])

    def _picture(self, uri: str) -> None:
        with tempfile.TemporaryDirectory(prefix="unclip-view-") as folder:
            file = Path(folder) / uri.rsplit("/", 1)[-1]
            file.write_bytes(storage.read_bytes(uri))
            self._client.log_artifact(self._id, str(file), "samples")
