"""Principal components of image embeddings, from where there are some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unclip.config.base import ConfigError
from unclip.data.embedding import EmbeddingStatistics
from unclip.data.pca import PrincipalComponents
from unclip.models.ar_prior import ARPriorModel
from unclip.pipelines.bundle import Bundle
from unclip.pipelines.manipulations.probing import PAPER_COUNTS
from unclip.pipelines.stages import ARPriorStageConfig

_PAPER_DIM = 1024


@dataclass(frozen=True)
class Components:
    """mean (D,) and components (M, D), orthonormal rows by falling variance; origin says of what."""

    mean: torch.Tensor
    components: torch.Tensor
    origin: str

    def counts(self, asked: Sequence[int]) -> list[int]:
        """The numbers to draw with, see `chosen_counts`."""
        available, dim = self.components.shape
        return chosen_counts(asked, available, dim)


def chosen_counts(asked: Sequence[int], available: int, dim: int) -> list[int]:
    """The numbers `asked` for, or the paper's shares of `dim` dimensions and all that are `available`.

    Raises `ConfigError` where a number is asked for that there is not.
    """
    for count in asked:
        if not 0 < count <= available:
            raise ConfigError(f"counts = {count}: there are {available} components")
    shares = {max(1, round(count * dim / _PAPER_DIM)) for count in PAPER_COUNTS}
    return list(asked) or sorted({count for count in shares if count < available} | {available})


def has_components(bundle: Bundle) -> bool:
    """Whether its prior is an autoregressive one, which holds some."""
    return isinstance(bundle.configs.get("prior"), ARPriorStageConfig)


def check_counts(bundle: Bundle, uri: str | None, asked: Sequence[int]) -> None:
    """Raises what `load_components` and `Components.counts` would, and reads no weights for it."""
    prior = bundle.configs.get("prior")
    if uri is not None:
        _stored(bundle, uri).counts(asked)
    elif isinstance(prior, ARPriorStageConfig):
        chosen_counts(asked, prior.model.num_components, prior.model.embed_dim)
    else:
        raise ConfigError("components: required, as the bundle has no autoregressive prior, which holds some")


def load_components(bundle: Bundle, uri: str | None) -> Components:
    """Those at `uri`, or of the bundle's autoregressive prior.

    Raises `ConfigError` where there are none, or they belong to another CLIP, and `DataError` for a file of another kind.
    """
    if uri is not None:
        return _stored(bundle, uri)
    check_counts(bundle, uri, ())
    model = bundle.load_model("prior")
    assert isinstance(model, ARPriorModel)
    return Components(model.codec.mean, model.codec.components, "components of the autoregressive prior")


def fit_components(image_embed: torch.Tensor, origin: str) -> Components:
    """Those of given embeddings (N, D): at most N - 1."""
    statistics = EmbeddingStatistics(image_embed.shape[1])
    statistics.update(image_embed.cpu().numpy())
    found = PrincipalComponents.fit(statistics, clip="")
    return Components(torch.from_numpy(found.mean), torch.from_numpy(found.components), origin)


def _stored(bundle: Bundle, uri: str) -> Components:
    found = PrincipalComponents.load(uri)
    if bundle.clip is None or found.clip != bundle.clip.fingerprint:
        raise ConfigError(f"components = {uri!r}: of the CLIP {found.clip}, which is not the bundle's")
    return Components(torch.from_numpy(found.mean), torch.from_numpy(found.components), "components of the records")
