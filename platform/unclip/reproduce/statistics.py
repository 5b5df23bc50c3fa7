"""What some runs of a comparison decide: the interval of the mean of paired differences, and the verdict it gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import t as student

CONFIDENCE = 0.95
Verdict = Literal["held", "did not hold", "not decided"]


@dataclass(frozen=True)
class Interval:
    """A mean and its two-sided confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """On "the mean is above 0": `held` where all of the interval is, `did not hold` where all of it is below."""
        if self.low > 0:
            return "held"
        return "did not hold" if self.high < 0 else "not decided"


def paired_interval(differences: Sequence[float]) -> Interval:
    """Of the mean of n >= 2 differences, one a seed: mean +- t(0.975, n - 1) s / sqrt(n) (Student 1908).

    What both sides of a seed share (data, initial weights, noise) cancels in its difference. Of equal differences the
    interval is a point.
    """
    if len(differences) < 2:
        raise ValueError(f"{len(differences)} differences have no interval; two are needed")
    values = np.asarray(differences, dtype=np.float64)
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
    half = float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error
    return Interval(mean, mean - half, mean + half)
