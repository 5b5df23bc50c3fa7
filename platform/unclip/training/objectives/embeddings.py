"""Fitting a stage to the CLIP embeddings it is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unclip.config.base import ConfigError
from unclip.models.normalizer import EmbeddingNormalizerConfig, from_statistics, paper_scale
from unclip.training.objectives.base import NormalizationName

_UNIT_TOLERANCE = 0.01
"""More than what float16 leaves of a square norm."""


def check_embed_dim(model_dim: int, embed_dim: int) -> None:
    """Raises `ConfigError` where the model was configured for embeddings of another size."""
    if model_dim != embed_dim:
        raise ConfigError(
            f"objective.stage.model.embed_dim = {model_dim}: the CLIP of this run gives embeddings of {embed_dim} numbers; "
            f"set it to {embed_dim}"
        )


def fit_normalizer(
    normalization: NormalizationName, model_dim: int, embed_dim: int, statistics: Mapping[str, Any] | None
) -> EmbeddingNormalizerConfig:
    """The normaliser of z_i for embeddings of `embed_dim` numbers.

    Raises `ConfigError` where the model was configured for another size, whitening lacks statistics, or they are those of
    embeddings that do not have unit norm.
    """
    check_embed_dim(model_dim, embed_dim)
    if statistics is not None:
        _check_unit_norm(statistics)
    if normalization == "scale":
        return paper_scale(embed_dim)
    if statistics is None:
        raise ConfigError(
            "objective.normalization = 'whiten' needs the statistics that jobs/embed.py stores: "
            "set data.embeddings=columns, or objective.normalization=scale"
        )
    return from_statistics(statistics["mean"], statistics["std"])


def check_trainable(*, unit_norm: bool, clip_text: bool) -> None:
    """Raises `ValueError` for what prior and decoder of other libraries have, and no data of ours is for."""
    if not unit_norm:
        raise ValueError("stage.unit_norm = False: the embeddings that are trained on have unit norm; set it to true")
    if clip_text:
        raise ValueError(
            "stage.model.clip_text: stages with a CLIP inside are imported, and not trained here; set it to null"
        )


def _check_unit_norm(statistics: Mapping[str, Any]) -> None:
    """Both normalisations, and sampling, take embeddings for unit vectors: E|z|^2 = sum of mean^2 + std^2 = 1."""
    square = sum(value**2 for name in ("mean", "std") for value in statistics[name])
    if abs(square - 1) > _UNIT_TOLERANCE:
        raise ConfigError(
            f"the image embeddings of this run have a mean square norm of {square:.4g}, not 1: write them with jobs/embed.py"
        )
