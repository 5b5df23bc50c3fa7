"""CLIP embeddings as a batch stage, and streaming statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unclip.data.batches import Batch
from unclip.data.embedding import ClipEmbedStage, EmbeddingCovariance, EmbeddingStatistics
from unclip.models.clip import load_clip


@pytest.fixture(scope="module")
def batch(tiny_bundle: str) -> Batch:
    rng = np.random.default_rng(0)
    clip = load_clip(f"{tiny_bundle}/clip")
    return {
        "id": np.arange(7),
        "clip_image": rng.integers(0, 256, (7, clip.image_size, clip.image_size, 3), dtype=np.uint8),
        "tokens": np.zeros((7, 4), dtype=np.int32),  # those of the stage in training: handed on
        "clip_tokens": clip.tokenize([f"picture {i}" for i in range(7)]).numpy().astype(np.int32),
    }


def test_stage_adds_the_models_own_embeddings(tiny_bundle: str, batch: Batch) -> None:
    stage = ClipEmbedStage(f"{tiny_bundle}/clip", microbatch=3)
    stage.setup()
    made = stage.process(batch)
    assert set(made) == {"id", "tokens", "image_embed", "text_embed"}
    clip = load_clip(f"{tiny_bundle}/clip")
    with torch.no_grad():
        expected = {
            "image_embed": clip.encode_image(torch.from_numpy(batch["clip_image"])),
            "text_embed": clip.encode_text(torch.from_numpy(batch["clip_tokens"].astype(np.int64))),
        }
    for name, embeds in expected.items():
        assert made[name].dtype == np.float16
        torch.testing.assert_close(torch.from_numpy(made[name]).float(), embeds, atol=1e-3, rtol=0)
    assert np.abs(made["image_embed"][0] - made["image_embed"][1]).max() > 1e-3


def test_setup_comes_first(batch: Batch) -> None:
    with pytest.raises(RuntimeError, match="setup"):
        ClipEmbedStage("ViT-B-32").process(batch)


def test_statistics_are_those_of_all_vectors_whatever_the_parts() -> None:
    # A mean of 1000 deviations: summing squares in float32, or without centring, would lose the variance.
    vectors = (np.random.default_rng(0).standard_normal((1000, 5)) * [1, 2, 3, 4, 5] + 1000).astype(np.float32)
    exact = vectors.astype(np.float64)
    total = EmbeddingStatistics()
    for part in np.array_split(vectors, 3):
        worker = EmbeddingStatistics()
        for piece in np.array_split(part, 11):
            worker.update(piece)
        worker.update(part[:0])
        total.merge(EmbeddingStatistics.from_dict(worker.to_dict()))
    total.merge(EmbeddingStatistics())
    assert total.count == 1000
    np.testing.assert_allclose(total.mean, exact.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(total.std, exact.std(axis=0), rtol=1e-10)


def test_covariance_is_that_of_all_vectors_whatever_the_parts() -> None:
    mixing = np.random.default_rng(1).standard_normal((5, 5))
    vectors = (np.random.default_rng(0).standard_normal((1000, 5)) @ mixing + 1000).astype(np.float32)
    exact, total = vectors.astype(np.float64), EmbeddingCovariance(5)
    for part in np.array_split(vectors, 3):
        worker = EmbeddingCovariance(5)
        for piece in np.array_split(part, 11):
            worker.update(piece)
        worker.update(part[:0])
        total.merge(worker)
    total.merge(EmbeddingCovariance(5))
    assert total.count == 1000
    np.testing.assert_allclose(total.mean, exact.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(total.covariance, np.cov(exact.T, bias=True), rtol=1e-9, atol=1e-10)
