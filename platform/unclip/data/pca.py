"""The principal components of CLIP image embeddings, which the autoregressive prior predicts (unCLIP §2.2)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from unclip.data.embedding import EmbeddingStatistics
from unclip.data.manifest import DataError
from unclip.utils import storage

PCA_FILE = "pca.safetensors"
"""Name of the file that jobs/embed.py writes beside the records."""
_NO_VARIANCE = 1e-10
"""Components with less than this share of the largest variance are float16's rounding."""


@dataclass(frozen=True)
class PrincipalComponents:
    """The K directions in which the embeddings of a CLIP vary most, by falling variance.

    mean: (D,). components: (K, D), orthonormal rows, each with its largest entry positive. eigenvalues: (K,), the
    variances along them. All float64. total_variance: along all D directions. clip: the CLIP's fingerprint.
    """

    mean: npt.NDArray[np.float64]
    components: npt.NDArray[np.float64]
    eigenvalues: npt.NDArray[np.float64]
    total_variance: float
    clip: str

    @property
    def embed_dim(self) -> int:
        return int(self.components.shape[1])

    @property
    def num_components(self) -> int:
        return int(self.components.shape[0])

    @classmethod
    def fit(cls, seen: EmbeddingStatistics, *, clip: str) -> Self:
        """All directions in which the embeddings vary: fewer than D where there are few of them, none where all agree."""
        eigenvalues, vectors = np.linalg.eigh(seen.covariance)
        eigenvalues, components = eigenvalues[::-1].clip(min=0), vectors.T[::-1]
        rank = int((eigenvalues > _NO_VARIANCE * eigenvalues[0]).sum())
        components = components[:rank]
        largest = np.take_along_axis(components, np.abs(components).argmax(axis=1, keepdims=True), axis=1)
        components = np.ascontiguousarray(components * np.sign(largest))
        return cls(seen.mean, components, eigenvalues[:rank].copy(), float(eigenvalues.sum()), clip)

    def components_for(self, reconstruction_error: float) -> int:
        """How few of them leave at most this mean squared error, as a share of the variance (§2.2 keeps 319 for 1%).

        A share of the variance, not of the mean square: what all embeddings have in common, most of CLIP's, says nothing
        about any picture.
        """
        left_behind = self.total_variance - self.eigenvalues.cumsum()
        return min(int((left_behind > reconstruction_error * self.total_variance).sum()) + 1, self.num_components)

    def first(self, count: int) -> Self:
        """The `count` of most variance; `DataError` where there are fewer."""
        if count > self.num_components:
            raise DataError(
                f"num_components = {count}: the embeddings of {self.embed_dim} numbers vary in {self.num_components} "
                "directions"
            )
        return replace(self, components=self.components[:count], eigenvalues=self.eigenvalues[:count])

    def save(self, uri: str) -> None:
        """Writes a safetensors file, float64."""
        arrays = {"mean": self.mean, "components": self.components, "eigenvalues": self.eigenvalues}
        with storage.local_target(uri) as path:
            save_file({**arrays, "total_variance": np.array(self.total_variance)}, path, metadata={"clip": self.clip})

    @classmethod
    def load(cls, uri: str) -> Self:
        """Reads what `save` wrote; `DataError` where it is missing or something else."""
        try:
            with storage.local_file(uri) as path, safe_open(path, framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in ("mean", "components", "eigenvalues")}
                total = float(file.get_tensor("total_variance"))
                return cls(**arrays, total_variance=total, clip=file.metadata()["clip"])
        except FileNotFoundError:
            raise DataError(f"{uri!r} does not exist; jobs/embed.py writes it") from None
        except (SafetensorError, TypeError, KeyError) as error:
            raise DataError(f"{uri!r} does not hold principal components: {error!r}") from None
