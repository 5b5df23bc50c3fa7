"""CMMD and KID against sums over every pair, one after the other."""

from __future__ import annotations

import math

import numpy as np
import pytest

from unclip.evaluation import discrepancy
from unclip.evaluation.discrepancy import cmmd, kernel_distance, polynomial_discrepancy, squared_distances


def units(rows: int, width: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(rows, width)) + 0.3 * seed
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discrepancy, "_BLOCK", 7)


def test_cmmd_is_the_sum_over_all_pairs() -> None:
    """Sigma 10, times 1000, each picture's pair with itself among the means, as the authors' code has it."""
    x, y = units(20, 6, 0).astype(np.float64), units(15, 6, 1).astype(np.float64)

    def mean(first: np.ndarray, second: np.ndarray) -> float:
        return sum(math.exp(-((a - b) ** 2).sum() / 200) for a in first for b in second) / (len(first) * len(second))

    expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-9)
    assert cmmd(x, x[::-1]) == pytest.approx(0, abs=1e-9)


def test_kid_is_the_unbiased_sum_over_pairs_of_different_pictures() -> None:
    x, y = (values.astype(np.float64) for values in (units(12, 5, 0), units(9, 5, 2)))

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (a @ b / 5 + 1) ** 3

    within = [
        sum(kernel(part[i], part[j]) for i in range(len(part)) for j in range(len(part)) if i != j)
        / (len(part) * (len(part) - 1))
        for part in (x, y)
    ]
    across = sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))
    expected = sum(within) - 2 * across
    assert polynomial_discrepancy(x, y) == pytest.approx(expected, rel=1e-9)
    mean, deviation = kernel_distance(x[:9], y, subsets=3, subset_size=1000, seed=0)  # of all there are, three times
    assert mean == pytest.approx(polynomial_discrepancy(x[:9], y), rel=1e-9)
    assert deviation == pytest.approx(0, abs=1e-12)


def test_kids_subsets_scatter_around_the_distance_of_all() -> None:
    x, y = units(120, 4, 0), units(100, 4, 1)
    mean, deviation = kernel_distance(x, y, subsets=80, subset_size=20, seed=0)
    of_all = polynomial_discrepancy(x.astype(np.float64), y.astype(np.float64))
    assert deviation > 0
    assert abs(mean - of_all) < 5 * deviation / math.sqrt(80)
    assert kernel_distance(x, y, subsets=80, subset_size=20, seed=0) == (mean, deviation)
    assert kernel_distance(x, y, subsets=80, subset_size=20, seed=1) != (mean, deviation)


def test_distances_of_equal_rows_are_zero() -> None:
    values = units(30, 50, 3).astype(np.float64)
    distances = squared_distances(values, values)
    assert (np.diag(distances) == 0).all()
    expected = ((values[:, np.newaxis] - values) ** 2).sum(axis=2)
    np.testing.assert_allclose(distances, expected, atol=1e-12)
