"""CLIP embeddings as a batch stage, and streaming statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unclip.data.batches import Batch
from unclip.data.embedding import ClipEmbedStage, EmbeddingStatistics
from unclip.data.manifest import DataError
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


def test_text_states_are_rows_of_the_models_own(tiny_bundle: str, batch: Batch) -> None:
    stage = ClipEmbedStage(f"{tiny_bundle}/clip", microbatch=3, text_states=True)
    stage.setup()
    made = stage.process(batch)
    clip = load_clip(f"{tiny_bundle}/clip")
    embeds, states = clip.encode_text_states(torch.from_numpy(batch["clip_tokens"]))
    assert made["text_states"].dtype == np.float16
    assert made["text_states"].shape == (7, clip.context_length * clip.text_state_dim)
    second = made["text_states"][:, clip.text_state_dim : 2 * clip.text_state_dim]
    torch.testing.assert_close(torch.from_numpy(second).float(), states[:, 1], atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(torch.from_numpy(made["text_embed"]).float(), embeds, atol=1e-3, rtol=0)


def test_what_is_not_finite_is_refused_by_record(tiny_bundle: str, batch: Batch) -> None:
    stage = ClipEmbedStage(f"{tiny_bundle}/clip", microbatch=3)
    stage.setup()
    assert stage._clip is not None
    with torch.no_grad():  # a token that only the fifth caption has
        own = set(batch["clip_tokens"][4].tolist()) - set(np.delete(batch["clip_tokens"], 4, axis=0).ravel().tolist())
        stage._clip.clip.token_embedding.weight[own.pop()] = torch.nan
    with pytest.raises(DataError, match=r"record 14: text_embed is not finite"):
        stage.process(batch | {"id": np.arange(10, 17)})


def test_statistics_are_those_of_all_vectors_whatever_the_parts() -> None:
    # A mean of 1000 deviations: summing squares in float32, or without centring, would lose the variance.
    mixing = np.random.default_rng(1).standard_normal((5, 5))
    vectors = (np.random.default_rng(0).standard_normal((1000, 5)) @ mixing + 1000).astype(np.float32)
    exact, total = vectors.astype(np.float64), EmbeddingStatistics(5)
    for part in np.array_split(vectors, 3):
        worker = EmbeddingStatistics(5)
        for piece in np.array_split(part, 11):
            worker.update(piece)
        worker.update(part[:0])
        total.merge(EmbeddingStatistics.from_bytes(worker.to_bytes()))
    total.merge(EmbeddingStatistics(5))
    assert total.count == 1000
    np.testing.assert_allclose(total.mean, exact.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(total.covariance, np.cov(exact.T, bias=True), rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(total.std, exact.std(axis=0), rtol=1e-10)
