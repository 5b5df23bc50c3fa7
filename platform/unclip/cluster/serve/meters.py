"""A server's meters in Ray's metrics, which Prometheus scrapes from every node."""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge, Histogram, Metric

from unclip.cluster.gauges import LastingGauges
from unclip.serving.observe.catalogue import CATALOGUE, Meter
from unclip.serving.observe.meters import Meters


class RayMeters(Meters):
    """Ray exports them as `ray_NAME`, counters as `ray_NAME_total`, with the node and the worker among the labels."""

    def __init__(self) -> None:
        super().__init__()
        self._metrics = {name: _metric(name, meter) for name, meter in CATALOGUE.items()}
        self._gauges = LastingGauges()

    def _count(self, name: str, amount: float, labels: Mapping[str, str]) -> None:
        self._metrics[name].inc(amount, tags=dict(labels))

    def _set(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self._gauges.set(self._metrics[name], value, labels)

    def _observe(self, name: str, seconds: float, labels: Mapping[str, str]) -> None:
        self._metrics[name].observe(seconds, tags=dict(labels))


def _metric(name: str, meter: Meter) -> Metric:
    match meter.kind:
        case "counter":
            return Counter(name, meter.description, meter.labels)
        case "gauge":
            return Gauge(name, meter.description, meter.labels)
    return Histogram(name, meter.description, list(meter.buckets), meter.labels)
