"""The Fréchet distance against closed forms, SciPy's matrix square root, and what it may not depend on."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.stats import ortho_group

from unclip.data.embedding import EmbeddingStatistics
from unclip.evaluation.frechet import frechet_distance, statistics_of


def gaussian(mean: np.ndarray, covariance: np.ndarray) -> EmbeddingStatistics:
    """Statistics of 101 vectors whose covariance over N - 1 is exactly this one."""
    statistics = EmbeddingStatistics(len(mean))
    statistics.count, statistics.mean, statistics.scatter = 101, mean, 100 * covariance
    return statistics


def features(rows: int, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)


def test_gaussians_along_the_axes_have_a_closed_form() -> None:
    """The covariances commute: the distance is that of the means and of the deviations."""
    means, deviations = np.array([[1.0, -2.0, 0.5], [0.0, 3.0, 0.5]]), np.array([[1.0, 2.0, 3.0], [4.0, 0.5, 3.0]])
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    found = frechet_distance(*(gaussian(m, np.diag(d**2)) for m, d in zip(means, deviations, strict=True)))
    assert found == pytest.approx(expected, rel=1e-12)


def test_is_that_of_the_matrix_square_root() -> None:
    first, second = features(400, 12, 0), features(300, 12, 1)
    covariances = [np.cov(part, rowvar=False) for part in (first, second)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root)
    assert frechet_distance(statistics_of(first), statistics_of(second)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rows", [200, 7])
def test_is_zero_between_equal_sets(rows: int) -> None:
    """Also of fewer pictures than dimensions, whose covariance has no inverse."""
    values = features(rows, 16, 2)
    distance = frechet_distance(statistics_of(values), statistics_of(values[::-1]))
    assert abs(distance) < 1e-9 * np.trace(np.cov(values, rowvar=False))


def test_turning_both_sets_changes_nothing() -> None:
    first, second = features(100, 8, 3), features(80, 8, 4)
    turn = ortho_group.rvs(8, random_state=0)
    before, after = (
        frechet_distance(statistics_of(first @ matrix), statistics_of(second @ matrix)) for matrix in (np.eye(8), turn)
    )
    assert after == pytest.approx(before, rel=1e-10)


def test_statistics_are_those_of_all_blocks_together() -> None:
    values = features(20_000, 3, 5).astype(np.float32)
    statistics = statistics_of(values)
    np.testing.assert_allclose(statistics.mean, values.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        statistics.scatter / (len(values) - 1), np.cov(values.astype(np.float64), rowvar=False), rtol=1e-10
    )
