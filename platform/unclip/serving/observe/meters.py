"""Counters, gauges and histograms of the catalogue, whoever keeps them."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping

import torch

from unclip.generation.engine.metrics import EngineMetrics
from unclip.serving.observe.catalogue import CATALOGUE, Kind, Meter

__all__ = ["CATALOGUE", "MemoryMeters", "Meter", "Meters", "NoMeters", "publish", "publish_devices"]

_Series = tuple[str, tuple[tuple[str, str], ...]]


class Meters(ABC):
    """Takes what happens in a server; safe to use from any thread.

    Everywhere `name` is one of `CATALOGUE` with its prefix, and `labels` are exactly those it has there; `ValueError`
    otherwise.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals: dict[_Series, float] = {}

    def count(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """A counter rises by `amount`, at least 0."""
        _check(name, "counter", labels)
        if amount < 0:
            raise ValueError(f"{name}: amount = {amount}: a counter does not fall")
        if amount > 0:
            self._count(name, amount, labels)

    def count_to(self, name: str, total: float, **labels: str) -> None:
        """A counter rises by what `total` has risen since the last call; one that has fallen began again at 0."""
        series = _series(name, labels)
        with self._lock:
            before = self._totals.get(series, 0.0)
            self._totals[series] = total
        self.count(name, total - before if total >= before else total, **labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        """A gauge is `value` from now on."""
        _check(name, "gauge", labels)
        self._set(name, value, labels)

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Something took `seconds`."""
        _check(name, "histogram", labels)
        self._observe(name, seconds, labels)

    @abstractmethod
    def _count(self, name: str, amount: float, labels: Mapping[str, str]) -> None: ...

    @abstractmethod
    def _set(self, name: str, value: float, labels: Mapping[str, str]) -> None: ...

    @abstractmethod
    def _observe(self, name: str, seconds: float, labels: Mapping[str, str]) -> None: ...


class NoMeters(Meters):
    """Keeps nothing."""

    def _count(self, name: str, amount: float, labels: Mapping[str, str]) -> None: ...

    def _set(self, name: str, value: float, labels: Mapping[str, str]) -> None: ...

    def _observe(self, name: str, seconds: float, labels: Mapping[str, str]) -> None: ...


class MemoryMeters(Meters):
    """Keeps all values in this process, in memory that does not grow with what happens."""

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[_Series, float] = {}
        self._buckets: dict[_Series, Counter[int]] = {}

    def value(self, name: str, **labels: str) -> float:
        """Of a counter or gauge, or the seconds of a histogram, added up over all values that have these labels."""
        return sum(self._values[series] for series in self._matching(name, labels))

    def observations(self, name: str, **labels: str) -> int:
        """How many events the histogram has, over all values that have these labels."""
        return sum(self.buckets(name, **labels))

    def buckets(self, name: str, **labels: str) -> tuple[int, ...]:
        """Events of a histogram between its bounds, the last number those beyond the largest."""
        counts: Counter[int] = Counter()
        for series in self._matching(name, labels):
            counts.update(self._buckets.get(series, {}))
        return tuple(counts[place] for place in range(len(CATALOGUE[name].buckets) + 1))

    def _matching(self, name: str, labels: Mapping[str, str]) -> Iterator[_Series]:
        with self._lock:
            known = list(self._values)
        return (series for series in known if series[0] == name and set(labels.items()) <= set(series[1]))

    def _count(self, name: str, amount: float, labels: Mapping[str, str]) -> None:
        with self._lock:
            series = _series(name, labels)
            self._values[series] = self._values.get(series, 0.0) + amount

    def _set(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        with self._lock:
            self._values[_series(name, labels)] = value

    def _observe(self, name: str, seconds: float, labels: Mapping[str, str]) -> None:
        with self._lock:
            series = _series(name, labels)
            self._values[series] = self._values.get(series, 0.0) + seconds
            self._buckets.setdefault(series, Counter())[bisect_left(CATALOGUE[name].buckets, seconds)] += 1


def publish(meters: Meters, metrics: EngineMetrics, group: str) -> None:
    """What an engine says of itself, as meters; call it every few seconds with its newest snapshot."""
    meters.set("unclip_serve_queued_steps", metrics.queued_steps, group=group)
    meters.set("unclip_serve_engine_waiting", metrics.waiting, group=group)
    meters.set("unclip_serve_engine_running", metrics.running, group=group)
    ends = {
        "finished": metrics.finished,
        "failed": metrics.failed,
        "cancelled": metrics.cancelled,
        "expired": metrics.expired,
    }
    for end, total in ends.items():
        meters.count_to("unclip_serve_engine_requests", total, group=group, end=end)
    for stage, found in metrics.stages.items():
        where = {"group": group, "stage": stage}
        meters.set("unclip_serve_rows_running", found.running, **where)
        meters.set("unclip_serve_rows_waiting", found.waiting, **where)
        meters.set("unclip_serve_slots", found.slots, **where)
        meters.count_to("unclip_serve_steps", found.steps, **where)
        meters.count_to("unclip_serve_step_seconds", found.step_seconds, **where)
        meters.count_to("unclip_serve_rows", found.rows, **where)
        meters.count_to("unclip_serve_forward_rows", found.forward_rows, **where)
        meters.count_to("unclip_serve_padding_rows", found.padding_rows, **where)


def publish_devices(meters: Meters) -> None:
    """Memory of the GPUs that this process sees, which other processes may share; nothing where there are none."""
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        device = str(torch.cuda.get_device_properties(index).uuid)
        meters.set("unclip_serve_gpu_used_bytes", total - free, device=device)
        meters.set("unclip_serve_gpu_total_bytes", total, device=device)


def _check(name: str, kind: Kind, labels: Mapping[str, str]) -> None:
    meter = CATALOGUE.get(name)
    if meter is None:
        raise ValueError(f"{name}: no such meter; the catalogue has {', '.join(CATALOGUE)}")
    if meter.kind != kind:
        raise ValueError(f"{name}: is a {meter.kind}, not a {kind}")
    if labels.keys() != set(meter.labels):
        raise ValueError(f"{name}: labels are {', '.join(labels) or 'none'}, not {', '.join(meter.labels) or 'none'}")


def _series(name: str, labels: Mapping[str, str]) -> _Series:
    return name, tuple(sorted(labels.items()))
