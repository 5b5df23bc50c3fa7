"""Precision, recall and diversity of a set of features."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from unclip.evaluation.discrepancy import Features, blocks, squared_distances


def precision_and_recall(generated: npt.NDArray[Any], real: npt.NDArray[Any], neighbours: int) -> tuple[float, float]:
    """Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models".

    A set's manifold is the union of spheres around its features, each as wide as the distance to the `neighbours`-th
    nearest other one of the set. Precision is the share of generated features in the manifold of the real ones, recall
    that of real features in the manifold of the generated ones.
    """
    first, second = generated.astype(np.float64), real.astype(np.float64)
    return _covered(first, by=second, neighbours=neighbours), _covered(second, by=first, neighbours=neighbours)


def _covered(points: Features, *, by: Features, neighbours: int) -> float:
    radii = np.concatenate([_squared_radii(by, rows, neighbours) for rows in blocks(by)])
    inside = np.zeros(len(points), dtype=bool)
    for rows in blocks(points):
        for columns in blocks(by):
            distances = squared_distances(points[rows], by[columns])
            inside[rows] |= (distances <= radii[columns]).any(axis=1)
    return float(inside.mean())


def _squared_radii(features: Features, rows: slice, neighbours: int) -> Features:
    """Of the spheres around `rows`; the nearest found so far are kept from block to block."""
    nearest = np.full((len(features[rows]), neighbours), np.inf)
    for columns in blocks(features):
        distances = squared_distances(features[rows], features[columns])
        if rows == columns:
            np.fill_diagonal(distances, np.inf)
        nearest = np.partition(np.concatenate([nearest, distances], axis=1), neighbours - 1, axis=1)[:, :neighbours]
    radii: Features = nearest.max(axis=1)
    return radii


def diversity(features: npt.NDArray[Any]) -> float:
    """The mean cosine distance of all pairs of (N, D): 0 where all point the same way."""
    values = features.astype(np.float64)
    units = values / np.linalg.norm(values, axis=1, keepdims=True)
    count, total = len(units), units.sum(axis=0)
    return float(1 - (total @ total - (units**2).sum()) / (count * (count - 1)))
