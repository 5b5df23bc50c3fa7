"""The Fréchet distance between two sets of features, each taken as a Gaussian (Heusel et al. 2017): FID, FD-CLIP."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from unclip.data.embedding import EmbeddingStatistics

_BLOCK = 8192


def statistics_of(features: npt.NDArray[Any]) -> EmbeddingStatistics:
    """Mean and covariance of (N, D), in float64, block by block."""
    statistics = EmbeddingStatistics(features.shape[1])
    for start in range(0, len(features), _BLOCK):
        statistics.update(features[start : start + _BLOCK])
    return statistics


def frechet_distance(first: EmbeddingStatistics, second: EmbeddingStatistics) -> float:
    """|mean_1 - mean_2|^2 + trace(C_1 + C_2 - 2 (C_1 C_2)^(1/2)), with covariances over N - 1 as FID's own code has them.

    The last trace is the sum of the singular values of C_1^(1/2) C_2^(1/2), which exists for any covariance, also one of
    fewer pictures than dimensions.
    """
    roots, trace = [], 0.0
    for statistics in (first, second):
        covariance = statistics.scatter / (statistics.count - 1)
        values, vectors = np.linalg.eigh(covariance)
        roots.append((vectors * np.sqrt(values.clip(min=0))) @ vectors.T)
        trace += float(np.trace(covariance))
    shared = float(np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum())
    return float(((first.mean - second.mean) ** 2).sum()) + trace - 2 * shared
