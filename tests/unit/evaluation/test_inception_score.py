"""The Inception Score where it is known: all pictures alike, all certain, and by its definition."""

from __future__ import annotations

import numpy as np
import pytest

from unclip.evaluation.inception_score import inception_score


def test_pictures_that_are_all_the_same_score_1() -> None:
    logits = np.tile(np.random.default_rng(0).normal(size=(1, 7)), (40, 1))
    assert inception_score(logits, splits=4, seed=0) == pytest.approx((1, 0))
    assert inception_score(np.zeros((40, 7)), splits=4, seed=0) == pytest.approx((1, 0))


def test_certain_and_equally_frequent_classes_score_their_number() -> None:
    """With logits so far apart that the other classes' probabilities are 0 in floating point."""
    logits = 1e4 * np.eye(6, dtype=np.float32)[np.arange(60) % 6]
    assert inception_score(logits, splits=1, seed=0) == pytest.approx((6, 0))


def test_it_is_the_exponential_of_the_mean_divergence_in_each_part() -> None:
    logits = np.random.default_rng(1).normal(scale=3, size=(50, 9))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    order = np.random.default_rng(5).permutation(50)
    scores = []
    for part in (order[:25], order[25:]):
        marginal = probabilities[part].mean(axis=0)
        divergences = [
            sum(p * np.log(p / q) for p, q in zip(probabilities[row], marginal, strict=True)) for row in part
        ]
        scores.append(np.exp(np.mean(divergences)))
    assert inception_score(logits, splits=2, seed=5) == pytest.approx((np.mean(scores), np.std(scores)))
    assert inception_score(logits[:1], splits=10, seed=5) == pytest.approx((1, 0))  # as many parts as pictures
