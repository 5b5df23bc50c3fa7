"""CLIP-scores and their baseline against every single dot product; intervals that hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from unclip.evaluation.caption_scores import bootstrap_interval, clip_scores, score_with_other_captions


def units(rows: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(rows, 6)) + 0.5
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def test_scores_are_dot_products_of_each_picture_with_its_own_caption() -> None:
    images, texts = units(9, 0), units(9, 1)
    expected = [float(np.dot(a.astype(np.float64), b.astype(np.float64))) for a, b in zip(images, texts, strict=True)]
    np.testing.assert_allclose(clip_scores(images, texts), expected, rtol=1e-12)


def test_the_baseline_is_over_all_pairs_of_another_text() -> None:
    captions = ["a", "b", "a", "c", "c", "c"]
    images, texts = units(6, 2), units(6, 3)
    pairs = [
        float(images[i].astype(np.float64) @ texts[j].astype(np.float64))
        for i in range(6)
        for j in range(6)
        if captions[i] != captions[j]
    ]
    assert score_with_other_captions(images, texts, captions) == pytest.approx(np.mean(pairs), rel=1e-12)
    assert score_with_other_captions(images, texts, ["a"] * 6) is None


def test_the_interval_is_that_of_independent_captions() -> None:
    """Of pictures that differ by caption alone, ten of each are no more evidence than one."""
    of_captions = np.random.default_rng(4).normal(size=400)
    names = [f"caption {number}" for number in range(400)]
    once = bootstrap_interval(of_captions, names, resamples=2000, seed=0)
    tenfold = bootstrap_interval(np.repeat(of_captions, 10), list(np.repeat(names, 10)), resamples=2000, seed=0)
    assert tenfold == pytest.approx(once)
    error = 1.96 * of_captions.std() / np.sqrt(400)
    assert once == pytest.approx((of_captions.mean() - error, of_captions.mean() + error), abs=0.15 * error)


def test_the_interval_holds_the_mean_19_times_in_20() -> None:
    rng = np.random.default_rng(5)
    hits = 0
    for seed in range(100):
        scores = rng.normal(0.3, 0.05, size=60)
        low, high = bootstrap_interval(scores, [str(row) for row in range(60)], resamples=150, seed=seed)
        hits += low <= 0.3 <= high
    assert 86 <= hits < 100
