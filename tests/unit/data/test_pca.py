"""Principal components against NumPy's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from unclip.data.embedding import EmbeddingStatistics
from unclip.data.manifest import DataError
from unclip.data.pca import PrincipalComponents

D = 8
SPREADS = np.array([4.0, 2.0, 1.0, 0.5, 0.1, 0.05, 0.0, 0.0])
"""Of the embeddings below along their own axes, two of which they do not vary in."""


def embeddings(count: int = 400) -> np.ndarray:
    """(count, D) float64 with a large common part, and exactly these deviations along random orthonormal axes."""
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((count, D))
    scores -= scores.mean(axis=0)
    scores = np.linalg.qr(scores)[0] * np.sqrt(count) * SPREADS
    axes, _ = np.linalg.qr(rng.standard_normal((D, D)))
    return scores @ axes.T + 3


def fit(vectors: np.ndarray) -> PrincipalComponents:
    seen = EmbeddingStatistics(vectors.shape[1])
    seen.update(vectors)
    return PrincipalComponents.fit(seen, clip="a fingerprint")


def reconstructed(vectors: np.ndarray, basis: PrincipalComponents) -> np.ndarray:
    return (vectors - basis.mean) @ basis.components.T @ basis.components + basis.mean


def test_components_are_numpys_by_falling_eigenvalue() -> None:
    vectors = embeddings()
    basis = fit(vectors)
    assert basis.num_components == 6  # those of no variance are none
    np.testing.assert_allclose(np.sqrt(basis.eigenvalues), SPREADS[:6], rtol=1e-9)
    np.testing.assert_allclose(basis.components @ basis.components.T, np.eye(6), atol=1e-12)
    _, _, directions = np.linalg.svd(vectors - vectors.mean(axis=0))
    np.testing.assert_allclose(np.abs((basis.components * directions[:6]).sum(axis=1)), 1, rtol=1e-9)
    largest = np.take_along_axis(basis.components, np.abs(basis.components).argmax(axis=1)[:, None], axis=1)
    assert (largest > 0).all()


@pytest.mark.parametrize(("target", "count"), [(0.3, 1), (0.1, 2), (0.02, 3), (0.01, 4), (0.0001, 6)])
def test_as_few_as_the_error_allows(target: float, count: int) -> None:
    vectors = embeddings()
    basis = fit(vectors)
    assert basis.components_for(target) == count

    def error(components: int) -> float:
        left = reconstructed(vectors, basis.first(components)) - vectors
        return float((left**2).sum() / ((vectors - vectors.mean(axis=0)) ** 2).sum())

    assert error(count) <= target
    assert count == 1 or error(count - 1) > target


def test_directions_without_variance_are_no_components() -> None:
    with pytest.raises(DataError, match="num_components = 7: the embeddings of 8 numbers vary in 6 directions"):
        fit(embeddings()).first(7)
    same = fit(np.ones((5, D)))
    assert same.num_components == same.components_for(0.01) == 0


def test_what_was_written_is_read(tmp_path: Path) -> None:
    basis, path = fit(embeddings()), str(tmp_path / "deep" / "pca.safetensors")
    basis.save(path)
    read = PrincipalComponents.load(path)
    for name in ("mean", "components", "eigenvalues"):
        np.testing.assert_array_equal(getattr(read, name), getattr(basis, name))
    assert (read.total_variance, read.clip) == (basis.total_variance, "a fingerprint")
    with pytest.raises(DataError, match=r"nowhere.* does not exist; jobs/embed.py writes it"):
        PrincipalComponents.load(str(tmp_path / "nowhere"))


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_text("no tensors")
    with pytest.raises(DataError, match="does not hold principal components"):
        PrincipalComponents.load(str(path))
    save_file({"mean": np.zeros(3)}, path)
    with pytest.raises(DataError, match="does not hold principal components"):
        PrincipalComponents.load(str(path))
    basis = fit(embeddings())
    arrays = {"mean": basis.mean, "components": basis.components, "eigenvalues": basis.eigenvalues}
    save_file({**arrays, "total_variance": np.array(1.0)}, path)  # of no CLIP
    with pytest.raises(DataError, match="does not hold principal components"):
        PrincipalComponents.load(str(path))
