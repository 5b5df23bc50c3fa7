"""Nearest training pictures against all cosines at once, and what is said of copies and of pictures that are none."""

from __future__ import annotations

import numpy as np
import pytest

from unclip.evaluation import discrepancy
from unclip.evaluation.neighbours import Nearest, memorisation, nearest


def directions(count: int, *, seed: int, width: int = 12) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(count, width))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def test_against_all_cosines_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks that neither number divides."""
    monkeypatch.setattr(discrepancy, "_BLOCK", 16)
    own, training = directions(53, seed=0), directions(131, seed=1)
    found = nearest(own, training)
    cosines = own.astype(np.float64) @ training.astype(np.float64).T
    np.testing.assert_array_equal(found.rows, cosines.argmax(axis=1))
    np.testing.assert_allclose(found.similarities, cosines.max(axis=1), rtol=1e-12)


def test_exact_duplicates_are_found_the_first_of_equal_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discrepancy, "_BLOCK", 16)
    training = directions(100, seed=1)
    training[70] = training[20]  # a block later
    own = training[[20, 5, 99]]
    found = nearest(own, training)
    assert found.rows.tolist() == [20, 5, 99]
    np.testing.assert_allclose(found.similarities, 1, atol=1e-6)


def test_copies_are_near_and_held_out_pictures_are_as_near_as_they_are() -> None:
    training, held_out = directions(400, seed=1), directions(3000, seed=2)
    baseline = nearest(held_out, training)
    copies = memorisation(nearest(training[:50], training), [None] * 50, baseline, resamples=100, seed=0)
    assert (copies["near_share"], copies["low"], copies["high"]) == (1, 1, 1)
    assert copies["largest"] == pytest.approx(1, abs=1e-6)
    same = memorisation(baseline, [None] * 3000, baseline, resamples=100, seed=0)
    assert same["near_share"] == pytest.approx(0.01)
    assert same["similarity"] == same["held_out_similarity"]
    others = memorisation(nearest(directions(3000, seed=3), training), [None] * 3000, baseline, resamples=100, seed=0)
    assert 0.005 < others["near_share"] < 0.02  # as far from training pictures as held-out ones are


def test_pictures_of_one_caption_are_drawn_together() -> None:
    """Two captions, all pictures of one near, of the other none: the interval is as wide as two draws make it."""
    baseline = Nearest(np.zeros(200, dtype=np.int64), np.linspace(0, 0.5, 200))
    pictures = Nearest(np.zeros(100, dtype=np.int64), np.repeat([0.9, 0.1], 50))
    captions = ["first"] * 50 + ["second"] * 50
    found = memorisation(pictures, captions, baseline, resamples=200, seed=0)
    assert (found["near_share"], found["low"], found["high"]) == (0.5, 0, 1)


def test_without_held_out_pictures_only_distances_are_told() -> None:
    training = directions(40, seed=1)
    found = memorisation(nearest(training[:4], training), [None] * 4, None, resamples=100, seed=0)
    assert found.keys() == {"pictures", "similarity", "largest"}
