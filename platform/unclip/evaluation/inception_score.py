"""The Inception Score (Salimans et al. 2016, "Improved Techniques for Training GANs", section 4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp


def inception_score(logits: npt.NDArray[Any], *, splits: int, seed: int) -> tuple[float, float]:
    """Mean and standard deviation over `splits` random parts of exp(E_x KL(p(y|x) || p(y))), p(y) the mean over the part.

    From 1, where all pictures have the same classes, to the number of classes, where each is certain and all are as frequent.
    As torch-fidelity computes it: all classes that the network has count, pictures are shuffled before they are divided.

    Args:
        logits: (N, C), of the network's classes.
        splits: as many as there are pictures at most.
    """
    order = np.random.default_rng(seed).permutation(len(logits))
    scores = []
    for part in np.array_split(order, min(splits, len(logits))):
        values = logits[part].astype(np.float64)
        of_pictures = values - logsumexp(values, axis=1, keepdims=True)
        of_all = logsumexp(of_pictures, axis=0) - np.log(len(part))  # log p(y), finite where a class never occurs
        divergence = (np.exp(of_pictures) * (of_pictures - of_all)).sum(axis=1)
        scores.append(float(np.exp(divergence.mean())))
    return float(np.mean(scores)), float(np.std(scores))
