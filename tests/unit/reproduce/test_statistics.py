"""Intervals against closed forms and their coverage; verdicts at their edges."""

from __future__ import annotations

import math

import numpy as np
import pytest

from unclip.reproduce.statistics import Interval, paired_interval


def test_interval_of_three_is_that_of_students_t_with_two_degrees_of_freedom() -> None:
    """With two degrees of freedom the quantile is known in closed form: t(p) = (2p - 1) / sqrt(2 p (1 - p))."""
    quantile = 0.95 / math.sqrt(2 * 0.975 * 0.025)
    interval = paired_interval([1.0, 2.0, 6.0])
    half = quantile * math.sqrt(7.0) / math.sqrt(3)  # mean 3, variance (4 + 1 + 9) / 2
    assert (interval.mean, interval.low, interval.high) == pytest.approx((3.0, 3.0 - half, 3.0 + half), rel=1e-12)


def test_interval_of_two_is_that_of_the_cauchy_distribution() -> None:
    half = math.tan(math.pi * 0.475) * 1.0  # half the distance of the two, times the 97.5% quantile
    interval = paired_interval([4.0, 6.0])
    assert (interval.low, interval.high) == pytest.approx((5.0 - half, 5.0 + half), rel=1e-12)


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    intervals = [paired_interval(random.normal(2.0, 3.0, 3).tolist()) for _ in range(2000)]
    covered = np.mean([interval.low <= 2.0 <= interval.high for interval in intervals])
    assert abs(covered - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 2000)


def test_one_seed_decides_nothing() -> None:
    with pytest.raises(ValueError, match="two are needed"):
        paired_interval([1.0])


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.1, 0.9, "held"),
        (0.0, 0.9, "not decided"),
        (-0.5, 0.9, "not decided"),
        (-0.9, 0.0, "not decided"),
        (-0.9, -0.1, "did not hold"),
    ],
)
def test_verdict(low: float, high: float, verdict: str) -> None:
    assert Interval((low + high) / 2, low, high).verdict == verdict
