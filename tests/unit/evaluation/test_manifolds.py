"""Precision, recall and diversity against brute force, and where the answer is plain."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from unclip.evaluation import discrepancy
from unclip.evaluation.manifolds import diversity, precision_and_recall


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discrepancy, "_BLOCK", 11)


def covered(points: np.ndarray, by: np.ndarray, neighbours: int) -> float:
    """The share of points in a sphere, by the definition."""
    found = 0
    for point in points:
        for index, centre in enumerate(by):
            others = sorted(np.linalg.norm(np.delete(by, index, axis=0) - centre, axis=1))
            if np.linalg.norm(point - centre) <= others[neighbours - 1]:
                found += 1
                break
    return found / len(points)


@pytest.mark.parametrize("neighbours", [1, 3, 5])
def test_precision_and_recall_are_those_of_the_definition(neighbours: int) -> None:
    rng = np.random.default_rng(neighbours)
    generated, real = rng.normal(size=(40, 4)), rng.normal(size=(53, 4)) * 1.6 + 0.4
    precision, recall = precision_and_recall(generated, real, neighbours)
    assert 0 < precision < 1 or 0 < recall < 1
    assert (precision, recall) == (covered(generated, real, neighbours), covered(real, generated, neighbours))


def test_equal_sets_cover_each_other_and_distant_ones_do_not() -> None:
    values = np.random.default_rng(0).normal(size=(30, 6))
    copies = np.concatenate([values, values, values, values, values])  # spheres of no extent
    assert precision_and_recall(copies, copies[::-1], 3) == (1.0, 1.0)
    assert precision_and_recall(values, values + 1000, 3) == (0.0, 0.0)


def test_one_mode_of_two_is_precise_and_forgets_half() -> None:
    rng = np.random.default_rng(1)
    one, other = rng.uniform(size=(200, 2)), rng.uniform(size=(200, 2)) + 100
    precision, recall = precision_and_recall(rng.uniform(size=(200, 2)), np.concatenate([one, other]), 5)
    assert precision > 0.9
    assert recall == pytest.approx(0.5, abs=0.05)


def test_diversity_is_the_mean_over_all_pairs() -> None:
    values = np.random.default_rng(2).normal(size=(25, 7)) + 1
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in combinations(values, 2)]
    assert diversity(values) == pytest.approx(1 - np.mean(cosines), rel=1e-10)
    assert diversity(np.ones((5, 3))) == pytest.approx(0, abs=1e-12)
    assert diversity(np.array([[1.0, 0.0], [0.0, 2.0]])) == 1
