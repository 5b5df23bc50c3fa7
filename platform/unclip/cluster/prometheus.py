"""A run's newest numbers in Ray's metrics, which Prometheus scrapes from every node."""

from __future__ import annotations

import re

from ray.util.metrics import Gauge

from unclip.training.config import TrainConfig
from unclip.training.reporting.run_tail import News
from unclip.training.reporting.view import train_scalars, validation_scalars

_TAGS = ("run", "stage")


class PrometheusView:
    """Gauges `unclip_train_NAME`, `unclip_time_NAME` (shares) and `unclip_validation_NAME`, tagged by run and stage.

    Ray exports them as `ray_unclip_…` from the node of the driver. `unclip_train_restarts` counts.
    """

    name = "Prometheus"

    def open(self, config: TrainConfig) -> None:
        self._tags = {"run": config.run, "stage": config.stage}
        self._gauges: dict[str, Gauge] = {}
        self._restarts = 0

    def show(self, news: News) -> None:
        self._restarts += len(news.restarts)
        values: dict[str, float] = {"train/restarts": self._restarts}
        if news.records:
            values |= train_scalars(news.records[-1]) | {"train/step": news.records[-1]["step"]}
        if news.validations:
            values |= validation_scalars(news.validations[-1])
        for name, value in values.items():
            self._gauge(name).set(value, tags=self._tags)

    def close(self) -> None:
        """Nothing is under way: gauges end with the driver."""

    def _gauge(self, name: str) -> Gauge:
        if name not in self._gauges:
            group, metric = name.split("/", 1)
            description = f"{metric.replace('_', ' ')} of a run's newest {group} record"
            allowed = re.sub(r"[^a-zA-Z0-9_]", "_", f"unclip_{group}_{metric}")
            self._gauges[name] = Gauge(allowed, description=description, tag_keys=_TAGS)
        return self._gauges[name]
