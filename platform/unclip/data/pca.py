"""The principal components of CLIP image embeddings, which the autoregressive prior predicts (unCLIP §2.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
from pydantic import Field
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from unclip.config.base import Config, ConfigError
from unclip.data.batches import BatchSpec, make_batch
from unclip.data.embedding import EmbeddingCovariance
from unclip.data.manifest import DataError, read_slices, scan
from unclip.utils import storage
from unclip.utils.progress import progress_bar

_COLUMN = "image_embed"
_FILE = "pca.safetensors"
_NO_VARIANCE = 1e-10
"""Components with less than this share of the largest variance are float16's rounding."""


class FitPcaConfig(Config):
    """Whose principal components to find, and how many."""

    data: str = ""
    """Folder of Parquet shards with `image_embed`, as jobs/embed.py writes it, local or `s3://`; required."""
    out: str | None = None
    """File to write; null for `pca.safetensors` in the data folder."""
    num_components: int | None = Field(default=None, ge=1)
    """How many to keep; null for as few as `reconstruction_error` allows."""
    reconstruction_error: float = Field(default=0.01, gt=0, lt=1)
    """Mean squared error of embeddings put together from the components, as a share of their variance (§2.2: 1%)."""


@dataclass(frozen=True)
class PrincipalComponents:
    """The K directions in which embeddings vary most, by falling variance.

    mean: (D,). components: (K, D), orthonormal rows, each with its largest entry positive. eigenvalues: (K,), the
    variances along them. All float64.
    """

    mean: npt.NDArray[np.float64]
    components: npt.NDArray[np.float64]
    eigenvalues: npt.NDArray[np.float64]

    @property
    def embed_dim(self) -> int:
        return int(self.components.shape[1])

    @property
    def num_components(self) -> int:
        return int(self.components.shape[0])

    @classmethod
    def fit(cls, seen: EmbeddingCovariance, *, num_components: int | None, reconstruction_error: float) -> Self:
        """The `num_components` first, or as few as leave at most `reconstruction_error` of the variance behind.

        The error counts as a share of the variance, not of the mean square: what all embeddings have in common, most of
        CLIP's, says nothing about any picture. Raises `DataError` where there are fewer directions of any variance.
        """
        eigenvalues, vectors = np.linalg.eigh(seen.covariance)
        eigenvalues, components = eigenvalues[::-1].clip(min=0), vectors.T[::-1]
        left_behind = 1 - eigenvalues.cumsum() / max(eigenvalues.sum(), np.finfo(np.float64).tiny)
        rank = int((eigenvalues > _NO_VARIANCE * eigenvalues[0]).sum())
        wanted = num_components or int((left_behind > reconstruction_error).sum()) + 1
        if wanted > rank:
            raise DataError(
                f"num_components = {wanted}: {seen.count} embeddings of {len(eigenvalues)} numbers vary in {rank} directions"
            )
        components = components[:wanted]
        largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
        return cls(seen.mean, np.ascontiguousarray(components * np.sign(largest)), eigenvalues[:wanted])

    def save(self, uri: str) -> None:
        """Writes a safetensors file, float64."""
        arrays = {"mean": self.mean, "components": self.components, "eigenvalues": self.eigenvalues}
        with storage.local_target(uri) as path:
            save_file(arrays, path)

    @classmethod
    def load(cls, uri: str) -> Self:
        """Reads what `save` wrote; `DataError` where it is missing or something else."""
        try:
            with storage.local_file(uri) as path:
                return cls(**load_file(path))
        except FileNotFoundError:
            raise DataError(f"{uri!r} does not exist; jobs/fit_pca.py writes it") from None
        except (SafetensorError, TypeError) as error:
            raise DataError(f"{uri!r} does not hold principal components: {error}") from None


def fit_pca(config: FitPcaConfig, *, dry_run: bool = False) -> tuple[str, PrincipalComponents]:
    """The components of all embeddings in `config.data`, and the file that they are in.

    A pass over the column, one row group after the other. With `dry_run` nothing is written. Raises `ConfigError`,
    `DataError` or `OSError`.
    """
    if not config.data:
        raise ConfigError("data: required, but not given")
    manifest = scan(config.data, ("id", _COLUMN))
    out = storage.absolute(config.out or storage.join(manifest.uri, _FILE))
    spec = BatchSpec(embeddings=(_COLUMN,))
    seen: EmbeddingCovariance | None = None
    with progress_bar(manifest.rows, "row", title="pca") as bar:
        for index, fragment in enumerate(manifest.fragments):
            table = read_slices(manifest, [(index, 0, fragment.rows)], spec.columns())
            vectors = make_batch(table, np.arange(fragment.rows), spec, seed=0)[_COLUMN]
            seen = seen or EmbeddingCovariance(vectors.shape[1])
            seen.update(vectors)
            bar.update(fragment.rows)
    assert seen is not None  # scan() refuses a folder without rows
    basis = PrincipalComponents.fit(
        seen, num_components=config.num_components, reconstruction_error=config.reconstruction_error
    )
    if not dry_run:
        basis.save(out)
    return out, basis
