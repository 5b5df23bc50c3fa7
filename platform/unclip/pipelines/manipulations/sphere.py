"""Great circles: the way between two embeddings or two noises."""

from __future__ import annotations

import torch

_PARALLEL = 1e-4
"""Radians from 0 or pi within which the plane of the two vectors is lost in rounding."""


def slerp(start: torch.Tensor, end: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Spherical interpolation (Shoemake 1985): each row of (B, ...) as one vector, never its elements.

    Of unit vectors it is on the unit sphere, `share` of the angle from `start` to `end`; of others (noise, whose norms
    differ a little) the same weights hold, so that the ends are met exactly.

    Args:
        share: (B,) from 0, `start`, to 1, `end`.

    Raises `ValueError` where two vectors are opposite, as every way between them is as short.
    """
    a, b = start.flatten(1).double(), end.flatten(1).double()
    fraction = share.to(a)[:, None]
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1).clamp(-1, 1)
    angle = cosine.acos()[:, None]
    if bool((angle > torch.pi - _PARALLEL).any()):
        raise ValueError("two vectors are opposite: there is no shortest way between them")
    is_parallel = angle < _PARALLEL
    safe = torch.where(is_parallel, 1.0, angle)
    weights = [
        torch.where(is_parallel, linear, (linear * safe).sin() / safe.sin()) for linear in (1 - fraction, fraction)
    ]
    return (weights[0] * a + weights[1] * b).to(start).view(start.shape)
