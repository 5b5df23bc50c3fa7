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

_PAPER_DIM = 1024


@dataclass(frozen=True)
class Components:
    """mean (D,) and components (M, D), orthonormal rows by falling variance; origin says of what."""

    mean: torch.Tensor
    components: torch.Tensor
    origin: str

    def counts(self, asked: Sequence[int]) -> list[int]:
        """The numbers to draw with: those `asked` for, or the paper's shares of the dimensions, and all there are."""
        available, dim = self.components.shape
        if asked:
            for count in asked:
                if not 0 < count <= available:
                    raise ConfigError(f"counts = {count}: there are {available} components")
            return list(asked)
        shares = {max(1, round(count * dim / _PAPER_DIM)) for count in PAPER_COUNTS}
        return sorted({count for count in shares if count < available} | {available})


def load_components(bundle: Bundle, uri: str | None) -> Components:
    """Those at `uri`, or of the bundle's autoregressive prior.

    Raises `ConfigError` where there are none, or they belong to another CLIP, and `DataError` for a file of another kind.
    """
    if uri is not None:
        found = PrincipalComponents.load(uri)
        if bundle.clip is None or found.clip != bundle.clip.fingerprint:
            raise ConfigError(f"components = {uri!r}: of the CLIP {found.clip}, which is not the bundle's")
        return Components(torch.from_numpy(found.mean), torch.from_numpy(found.components), "components of the records")
    model = bundle.load_model("prior") if "prior" in bundle.configs else None
    if not isinstance(model, ARPriorModel):
        raise ConfigError("components: required, as the bundle has no autoregressive prior, which holds some")
    return Components(model.codec.mean, model.codec.components, "components of the autoregressive prior")


def fit_components(image_embed: torch.Tensor, origin: str) -> Components:
    """Those of given embeddings (N, D): at most N - 1."""
    statistics = EmbeddingStatistics(image_embed.shape[1])
    statistics.update(image_embed.cpu().numpy())
    found = PrincipalComponents.fit(statistics, clip="")
    return Components(torch.from_numpy(found.mean), torch.from_numpy(found.components), origin)
