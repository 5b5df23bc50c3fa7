"""What sides serve at equal p95: read off between the points of their curves of rate and p95."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_LEVELS = 5


@dataclass(frozen=True)
class Point:
    """A side at one rate of arrivals: what it served of them, and the seconds within which it did 95% of them."""

    images_per_second: float
    p95: float


@dataclass(frozen=True)
class Level:
    """What `first` and `other` serve where both do 95% within `p95` seconds."""

    first: str
    other: str
    p95: float
    first_rate: float
    other_rate: float
    ratio: float

    @property
    def line(self) -> str:
        return (
            f"p95 {self.p95:5.2f} s  {self.first} {self.first_rate:5.2f}  {self.other} {self.other_rate:5.2f} images/s"
            f"  {self.first} / {self.other} = {self.ratio:.2f}"
        )


def at_equal_p95(curves: Mapping[str, Sequence[Point]], first: str) -> list[Level]:
    """`first` against each other side, at levels spread over the p95 that both have points around."""
    found = []
    for other in curves:
        if other == first:
            continue
        (low, high), (other_low, other_high) = (_span(curves[name]) for name in (first, other))
        low, high = max(low, other_low), min(high, other_high)
        for p95 in np.linspace(low, high, _LEVELS) if low < high else []:
            rates = rate_at(curves[first], float(p95)), rate_at(curves[other], float(p95))
            found.append(Level(first, other, float(p95), *rates, ratio=rates[0] / rates[1]))
    return found


def rate_at(points: Sequence[Point], p95: float) -> float:
    """The rate at which a side reaches `p95`, linear between its points.

    Where a higher rate has come out with a lower p95, chance was at work: the highest rate within `p95` counts.
    """
    rising = _rising(points)
    return float(np.interp(p95, [point.p95 for point in rising], [point.images_per_second for point in rising]))


def _span(points: Sequence[Point]) -> tuple[float, float]:
    rising = _rising(points)
    return rising[0].p95, rising[-1].p95


def _rising(points: Sequence[Point]) -> list[Point]:
    """Those that no other one beats in both: rates and p95 rise."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.p95, -point.images_per_second)):
        if not kept or point.images_per_second > kept[-1].images_per_second:
            kept.append(point)
    return kept
