"""The scale on which CLIP image embeddings are diffused; part of the bundle, since sampling must undo it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import torch
from pydantic import model_validator
from torch import nn

from unclip.config.base import Config


class EmbeddingNormalizerConfig(Config):
    """An affine map of embeddings, one mean and deviation for all components or one for each."""

    mean: float | tuple[float, ...] = 0.0
    """subtracted; a number, or one for each component"""
    std: float | tuple[float, ...] = 1.0
    """divided by; a number above 0, or one for each component"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        deviations = self.std if isinstance(self.std, tuple) else (self.std,)
        if not deviations or any(not deviation > 0 for deviation in deviations):
            raise ValueError(f"std: every value must be above 0, the least is {min(deviations, default=None)}")
        if isinstance(self.mean, tuple) and isinstance(self.std, tuple) and len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} components, std has {len(self.std)}")
        return self

    def build(self) -> EmbeddingNormalizer:
        return EmbeddingNormalizer(self)


class EmbeddingNormalizer(nn.Module):
    """Maps embeddings (B, D) to the scale of diffusion and back, in float32; has no weights of its own to save."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, config: EmbeddingNormalizerConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.tensor(config.mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(config.std, dtype=torch.float32), persistent=False)

    def normalize(self, z: torch.Tensor) -> torch.Tensor:
        return (z.float() - self.mean) / self.std

    def denormalize(self, z: torch.Tensor) -> torch.Tensor:
        return z.float() * self.std + self.mean


def paper_scale(embed_dim: int) -> EmbeddingNormalizerConfig:
    """unCLIP's scaling of unit-norm embeddings: times 17.2 at 1024 components (appendix C).

    That gives each component the standard deviation 17.2 / 32 = 0.54 of pictures in [-1, 1]; other widths get the
    factor which keeps that.
    """
    if embed_dim < 1:
        raise ValueError(f"embed_dim = {embed_dim}: must be at least 1")
    return EmbeddingNormalizerConfig(mean=0.0, std=1.0 / (17.2 * math.sqrt(embed_dim / 1024)))


def from_statistics(mean: Sequence[float], std: Sequence[float]) -> EmbeddingNormalizerConfig:
    """Whitening by the measured mean and standard deviation of each component.

    Deviations below a thousandth of the largest are raised to that, so that noise in components without signal (CLIP's
    space is of lower rank) is not blown up.
    """
    floor = max(std) / 1000
    deviations = tuple(max(float(value), floor) for value in std)
    return EmbeddingNormalizerConfig(mean=tuple(float(value) for value in mean), std=deviations)
