"""What a job costs: the hours of CPUs and GPUs that it claims, by all its drivers, and what these come to in money.

A driver adds its hours to those that it finds in a file of the job, which it writes anew every half minute: one that is killed
takes no more than that with it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray

from unclip.cluster.group import Group
from unclip.cluster.preflight import Demand, Node
from unclip.config.cost import CostConfig
from unclip.utils import storage
from unclip.utils.hardware import find_gpu

WRITE_EVERY_S = 30.0
_ACCELERATOR = "accelerator_type:"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hours:
    """Of CPUs as Ray counts them, and of GPUs by their kind as Ray calls it (`H100`), "" where it does not know it."""

    cpus: float = 0.0
    gpus: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, seconds: float, claimed: Node, kind: str = "") -> Hours:
        """Of what was claimed for that time, GPUs of that kind among it."""
        hours = seconds / 3600
        return cls(hours * claimed.cpus, {kind: hours * claimed.gpus} if claimed.gpus else {})

    def __add__(self, other: Hours) -> Hours:
        return Hours(self.cpus + other.cpus, Counter(self.gpus) + Counter(other.gpus))

    @property
    def all_gpus(self) -> float:
        """Of GPUs of all kinds."""
        return sum(self.gpus.values())

    def dollars(self, prices: CostConfig) -> float | None:
        """What has a price, added up; None where a kind of GPU has none, not even a guessed one, or nothing has."""
        each = [_gpu_price(kind, prices) for kind in self.gpus]
        if None in each or (not each and prices.cpu_hour is None):
            return None
        gpus = sum(hours * (price or 0.0) for hours, price in zip(self.gpus.values(), each, strict=True))
        return gpus + self.cpus * (prices.cpu_hour or 0.0)

    def words(self, prices: CostConfig) -> str:
        """`3.2 GPU-hours, 25.6 CPU-hours, about $8.00 (at $2.50 a GPU-hour)`, of that what there is."""
        parts = [f"{_figure(self.all_gpus)} GPU-hours"] if self.gpus else []
        parts.append(f"{_figure(self.cpus)} CPU-hours")
        dollars = self.dollars(prices)
        if dollars is not None:
            parts.append(f"about ${dollars:,.2f} (at {', '.join(self._prices(prices))})")
        return ", ".join(parts)

    def _prices(self, prices: CostConfig) -> Iterator[str]:
        if prices.gpu_hour is not None and self.gpus:
            yield f"${prices.gpu_hour:.2f} a GPU-hour"
        elif self.gpus:
            each = (f"${_gpu_price(kind, prices):.2f} a GPU-hour of {kind}" for kind in sorted(self.gpus))
            yield f"{', '.join(each)}: a guess"
        if prices.cpu_hour is not None:
            yield f"${prices.cpu_hour:.3f} a CPU-hour"


class Account:
    """The hours of one job, of drivers before this one and its own. A store that fails costs figures, not the job.

    Raises `OSError` where what the drivers before have written cannot be read.

    Args:
        uri: address of the file.
    """

    def __init__(self, uri: str, prices: CostConfig) -> None:
        self._uri, self._prices = uri, prices
        self._before, self._own = _read(uri), Hours()
        self._written_at = float("-inf")

    def show(self, own: Hours) -> None:
        """What this driver has claimed by now."""
        self._own = own
        if time.monotonic() - self._written_at >= WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        """Writes the file, which `show` does from time to time."""
        self._written_at = time.monotonic()
        try:
            storage.write_json(self._uri, self.record())
        except OSError as error:
            _log.warning(f"{self._uri} is not up to date: {error}")

    def record(self) -> dict[str, Any]:
        """`gpu_hours`, `cpu_hours`, `dollars` or None, the `text` of all that, and `gpu_hours_by_kind`."""
        hours = self._before + self._own
        dollars = hours.dollars(self._prices)
        return {
            "gpu_hours": round(hours.all_gpus, 6),
            "cpu_hours": round(hours.cpus, 6),
            "dollars": None if dollars is None else round(dollars, 4),
            "text": hours.words(self._prices),
            "gpu_hours_by_kind": {kind: round(amount, 6) for kind, amount in hours.gpus.items()},
        }


class GroupMeter:
    """Puts what a run's groups of workers claim, and what works for them, to its account."""

    def __init__(self, account: Account) -> None:
        self.account, self._own = account, Hours()

    @contextmanager
    def running(self, group: Group, demand: Demand) -> Iterator[Callable[[], None]]:
        """Counts from the start of the group's workers to the end of the block, which calls what it gets now and then."""
        claimed, before = Node(demand.cpus, demand.gpus), self._own
        began: float | None = None
        kind = ""

        def look() -> None:
            nonlocal began, kind
            if began is None and group.has_started():
                began, kind = time.monotonic(), gpu_kind(set(group.workers_of_nodes()))
            count()

        def count() -> None:
            if began is not None:
                self._own = before + Hours.of(time.monotonic() - began, claimed, kind)
                self.account.show(self._own)

        try:
            yield look
        finally:
            count()
            self.account.write()


def gpu_kind(nodes: set[str] | None = None) -> str:
    """What Ray calls the GPUs of these nodes, by default of all; "" where it does not know, or where there are several kinds."""
    found = {
        name.removeprefix(_ACCELERATOR)
        for node in ray.nodes()
        if node["Alive"] and (nodes is None or node["NodeID"] in nodes)
        for name in node["Resources"]
        if name.startswith(_ACCELERATOR)
    }
    return found.pop() if len(found) == 1 else ""


def _gpu_price(kind: str, prices: CostConfig) -> float | None:
    """Of an hour of such a GPU; None where nobody has said one and it is none that is known."""
    if prices.gpu_hour is not None:
        return prices.gpu_hour
    gpu = find_gpu(kind)
    return None if gpu is None else gpu.price


def _figure(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f}"
    return f"{hours:.2g}" if hours >= 0.01 else "under 0.01"


def _read(uri: str) -> Hours:
    try:
        found = storage.read_json(uri)
        gpus = {kind: float(hours) for kind, hours in found["gpu_hours_by_kind"].items()}
        return Hours(float(found["cpu_hours"]), gpus)
    except FileNotFoundError:
        return Hours()
    except (ValueError, KeyError, TypeError, AttributeError):
        _log.warning(f"{uri} is damaged: hours are counted from now on")
        return Hours()
