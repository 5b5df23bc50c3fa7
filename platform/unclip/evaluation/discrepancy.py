"""Maximum mean discrepancy between two sets of features: CMMD and KID.

All (N, D) features are taken in float64; no more than a block of kernel values is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Features = npt.NDArray[np.float64]
Kernel = Callable[[Features, Features], Features]
CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
_BLOCK = 2048


def cmmd(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> float:
    """CMMD of embeddings of unit norm (Jayasumana et al. 2024, "Rethinking FID"), as the authors' code computes it.

    The squared discrepancy under exp(-|x - y|^2 / (2 sigma^2)) with sigma 10, times 1000: the biased estimate, whose means
    take in each picture's pair with itself.
    """

    def kernel(x: Features, y: Features) -> Features:
        values = squared_distances(x, y)
        values *= -1 / (2 * CMMD_SIGMA**2)
        return np.exp(values, out=values)

    x, y = first.astype(np.float64), second.astype(np.float64)
    within = sum(_sum_within(kernel, part) / len(part) ** 2 for part in (x, y))
    return CMMD_SCALE * (within - 2 * _sum_between(kernel, x, y) / (len(x) * len(y)))


def kernel_distance(
    first: npt.NDArray[Any], second: npt.NDArray[Any], *, subsets: int, subset_size: int, seed: int
) -> tuple[float, float]:
    """KID (Bińkowski et al. 2018): mean and standard deviation of the unbiased estimate over pairs of random subsets."""
    x, y = first.astype(np.float64), second.astype(np.float64)
    size = min(subset_size, len(x), len(y))
    rng = np.random.default_rng(seed)
    values = [
        polynomial_discrepancy(x[rng.choice(len(x), size, replace=False)], y[rng.choice(len(y), size, replace=False)])
        for _ in range(subsets)
    ]
    return float(np.mean(values)), float(np.std(values))


def polynomial_discrepancy(x: Features, y: Features) -> float:
    """The unbiased squared discrepancy of (N, D) and (M, D), both at least 2, under (x y / D + 1)^3."""

    def kernel(a: Features, b: Features) -> Features:
        base = a @ b.T / a.shape[1] + 1
        return base * base * base  # a power takes ten times as long

    def within(a: Features) -> float:
        of_itself = float((((a**2).sum(axis=1) / a.shape[1] + 1) ** 3).sum())
        return (_sum_within(kernel, a) - of_itself) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * _sum_between(kernel, x, y) / (len(x) * len(y))


def squared_distances(x: Features, y: Features) -> Features:
    """(N, D), (M, D) -> (N, M); what rounding leaves between equal rows is 0."""
    of_rows, of_columns = (x**2).sum(axis=1), (y**2).sum(axis=1)
    distances: Features = x @ y.T  # changed in place: there are many, and each new array costs as much as the product
    distances *= -2
    distances += of_rows[:, np.newaxis]
    distances += of_columns
    distances[distances < 1e-12 * (of_rows.max() + of_columns.max())] = 0.0
    return distances


def blocks(features: Features) -> Iterator[slice]:
    """Rows that are compared with all others at once."""
    return (slice(start, start + _BLOCK) for start in range(0, len(features), _BLOCK))


def _sum_between(kernel: Kernel, x: Features, y: Features) -> float:
    return sum(float(kernel(x[rows], y[columns]).sum()) for rows in blocks(x) for columns in blocks(y))


def _sum_within(kernel: Kernel, x: Features) -> float:
    """Of all ordered pairs, each with itself among them; a block of different pictures counts for both orders."""
    total = 0.0
    for rows in blocks(x):
        for columns in blocks(x):
            if columns.start <= rows.start:
                total += float(kernel(x[rows], x[columns]).sum()) * (1 if columns == rows else 2)
    return total
