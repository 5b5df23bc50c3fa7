"""How well pictures fit their captions: CLIP-score, its confidence interval, and what captions of other pictures would get."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]
CONFIDENCE = 0.95


def clip_scores(images: npt.NDArray[Any], texts: npt.NDArray[Any]) -> Scores:
    """(N, D), (N, D) of unit norm -> (N,) cosines, not scaled as Hessel et al. 2021 do (2.5 times, negative ones 0)."""
    scores: Scores = (images.astype(np.float64) * texts.astype(np.float64)).sum(axis=1)
    return scores


def score_with_other_captions(
    images: npt.NDArray[Any], texts: npt.NDArray[Any], captions: Sequence[str]
) -> float | None:
    """The mean cosine of every picture with every caption that is another text than its own; None where all are the same.

    This is what pictures get that have nothing to do with their captions: CLIP's cosines do not begin at 0.
    """
    sums, counts = sums_with_other_captions(images, texts, captions)
    return float(sums.sum() / counts.sum()) if counts.any() else None


def sums_with_other_captions(
    first: npt.NDArray[Any], second: npt.NDArray[Any], captions: Sequence[str]
) -> tuple[Scores, npt.NDArray[np.int64]]:
    """For each row of `first` (N, D) the sum of its dot products with the rows of `second` (N, D) whose caption is another
    text than its own, and how many these are."""
    x, y = first.astype(np.float64), second.astype(np.float64)
    groups, counts = _grouped(captions)
    of_groups = np.zeros((len(counts), y.shape[1]))
    np.add.at(of_groups, groups, y)
    sums: Scores = (x * (y.sum(axis=0) - of_groups[groups])).sum(axis=1)
    return sums, len(x) - counts[groups]


def mean_and_interval(scores: Scores, captions: Sequence[str], *, resamples: int, seed: int) -> dict[str, float]:
    """`mean`, and `low` and `high` of its 95% interval."""
    low, high = bootstrap_interval(scores, captions, resamples=resamples, seed=seed)
    return {"mean": float(scores.mean()), "low": low, "high": high}


def bootstrap_interval(scores: Scores, captions: Sequence[str], *, resamples: int, seed: int) -> tuple[float, float]:
    """The 95% percentile interval of the mean. Captions are drawn again, each with all its pictures: those of one caption
    are more alike than others, so a picture alone is no independent sample."""
    groups, counts = _grouped(captions)
    sums = np.bincount(groups, scores)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for index in range(resamples):
        drawn = rng.integers(len(counts), size=len(counts))
        means[index] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _grouped(captions: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The number of each picture's caption, and how many pictures each caption has."""
    numbers: dict[str, int] = {}
    groups = np.array([numbers.setdefault(caption, len(numbers)) for caption in captions])
    return groups, np.bincount(groups)
