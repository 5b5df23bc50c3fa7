"""Nearest training pictures: whether a generator draws what it has been shown (a check for memorisation)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from unclip.evaluation.caption_scores import mean_and_interval
from unclip.evaluation.discrepancy import blocks
from unclip.evaluation.subject import Metrics

NEAR_SHARE = 0.01
"""Share of held-out pictures that count as near to a training picture."""


@dataclass(frozen=True)
class Nearest:
    """Of each of N pictures the nearest training picture.

    Args:
        rows: (N,) its number among them.
        similarities: (N,) the cosine of their features.
    """

    rows: npt.NDArray[np.int64]
    similarities: npt.NDArray[np.float64]


def nearest(features: npt.NDArray[Any], training: npt.NDArray[Any]) -> Nearest:
    """(N, D) and (M, D), both of unit norm. Of equally near ones the first counts; no more than a block of cosines is in
    memory."""
    rows = np.zeros(len(features), dtype=np.int64)
    similarities = np.full(len(features), -np.inf)
    for own in blocks(features):
        block = features[own].astype(np.float64)
        for others in blocks(training):
            cosines = block @ training[others].astype(np.float64).T
            best = cosines.argmax(axis=1)
            found = cosines[np.arange(len(best)), best]
            is_nearer = found > similarities[own]
            rows[own][is_nearer] = best[is_nearer] + others.start
            similarities[own][is_nearer] = found[is_nearer]
    return Nearest(rows, similarities)


def memorisation(
    pictures: Nearest, captions: Sequence[str | None], held_out: Nearest | None, *, resamples: int, seed: int
) -> Metrics:
    """How near pictures are to training pictures, and real pictures that were not trained on as the baseline.

    `similarity`: the mean cosine to the nearest, `largest`: the largest. With `held_out`: the same of those;
    `near_from`: the cosine that the nearest 1% of them reach; `near_share`: the share of pictures that reach it, with its
    95% interval `low` to `high` over captions. A generator that copies no more than chance has it comes to 0.01.
    """
    found: Metrics = {
        "pictures": len(pictures.rows),
        "similarity": float(pictures.similarities.mean()),
        "largest": float(pictures.similarities.max()),
    }
    if held_out is None:
        return found
    threshold = float(np.quantile(held_out.similarities, 1 - NEAR_SHARE))
    is_near = (pictures.similarities >= threshold).astype(np.float64)
    of_captions = [f"picture {row}" if caption is None else caption for row, caption in enumerate(captions)]
    interval = mean_and_interval(is_near, of_captions, resamples=resamples, seed=seed)
    return found | {
        "held_out": len(held_out.rows),
        "held_out_similarity": float(held_out.similarities.mean()),
        "held_out_largest": float(held_out.similarities.max()),
        "near_from": threshold,
        "near_share": interval["mean"],
        "low": interval["low"],
        "high": interval["high"],
    }
