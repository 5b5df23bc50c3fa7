"""Principal components against NumPy's own, and the job that finds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jobs import fit_pca as job

from unclip.data.embedding import EmbeddingCovariance
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


def fit(vectors: np.ndarray, **choice: float) -> PrincipalComponents:
    seen = EmbeddingCovariance(vectors.shape[1])
    seen.update(vectors)
    return PrincipalComponents.fit(seen, **{"num_components": None, "reconstruction_error": 0.01, **choice})


def reconstructed(vectors: np.ndarray, basis: PrincipalComponents) -> np.ndarray:
    return (vectors - basis.mean) @ basis.components.T @ basis.components + basis.mean


def test_components_are_numpys_by_falling_eigenvalue() -> None:
    vectors = embeddings()
    basis = fit(vectors, num_components=6)
    np.testing.assert_allclose(np.sqrt(basis.eigenvalues), SPREADS[:6], rtol=1e-9)
    np.testing.assert_allclose(basis.components @ basis.components.T, np.eye(6), atol=1e-12)
    _, _, directions = np.linalg.svd(vectors - vectors.mean(axis=0))
    np.testing.assert_allclose(np.abs((basis.components * directions[:6]).sum(axis=1)), 1, rtol=1e-9)
    largest = np.take_along_axis(basis.components, np.abs(basis.components).argmax(axis=1)[:, None], axis=1)
    assert (largest > 0).all()


@pytest.mark.parametrize(("target", "count"), [(0.3, 1), (0.1, 2), (0.02, 3), (0.01, 4), (0.0001, 6)])
def test_as_few_as_the_error_allows(target: float, count: int) -> None:
    vectors = embeddings()
    basis = fit(vectors, reconstruction_error=target)
    assert basis.num_components == count

    def error(components: int) -> float:
        left = reconstructed(vectors, fit(vectors, num_components=components)) - vectors
        return float((left**2).sum() / ((vectors - vectors.mean(axis=0)) ** 2).sum())

    assert error(count) <= target
    assert count == 1 or error(count - 1) > target


def test_directions_without_variance_are_no_components() -> None:
    with pytest.raises(DataError, match="num_components = 7: 400 embeddings of 8 numbers vary in 6 directions"):
        fit(embeddings(), num_components=7)
    with pytest.raises(DataError, match="vary in 0 directions"):
        fit(np.ones((5, D)))


def test_what_was_written_is_read(tmp_path: Path) -> None:
    basis, path = fit(embeddings()), str(tmp_path / "deep" / "pca.safetensors")
    basis.save(path)
    read = PrincipalComponents.load(path)
    for name in ("mean", "components", "eigenvalues"):
        np.testing.assert_array_equal(getattr(read, name), getattr(basis, name))
    with pytest.raises(DataError, match=r"nowhere.* does not exist; jobs/fit_pca.py writes it"):
        PrincipalComponents.load(str(tmp_path / "nowhere"))
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(DataError, match="does not hold principal components"):
        PrincipalComponents.load(str(tmp_path / "text"))


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Two shards with several row groups of embeddings."""
    vectors = embeddings().astype(np.float16)
    for index, part in enumerate(np.array_split(vectors, 2)):
        column = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), D)
        table = pa.table({"id": pa.array(range(len(part))), "image_embed": column})
        pq.write_table(table, tmp_path / f"{index}.parquet", row_group_size=70)
    return tmp_path


def test_the_job_sees_every_row(records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main(["--set", f"data={records}", "--dry-run"]) == 0
    assert not list(records.glob("*.safetensors"))
    assert job.main(["--set", f"data={records}"]) == 0
    assert "4 components of embeddings of 8 numbers are in" in capsys.readouterr().out
    found = PrincipalComponents.load(str(records / "pca.safetensors"))
    expected = fit(embeddings().astype(np.float16))
    np.testing.assert_allclose(found.components, expected.components, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.eigenvalues, expected.eigenvalues, rtol=1e-9)


def test_the_job_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main([]) == 2
    assert "data: required" in capsys.readouterr().err
    assert job.main(["--set", f"data={tmp_path}/none"]) == 2
    assert "does not exist" in capsys.readouterr().err
