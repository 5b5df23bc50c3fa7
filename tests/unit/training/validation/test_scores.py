"""Retrieval and zero-shot accuracy against counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unclip.recipes.clip import tiny_architecture
from unclip.training.validation.clip_scores import retrieval, zero_shot


def test_retrieval_counts_nearest_neighbours_and_takes_equal_captions_for_one() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(40, 4, generator=generator), dim=1) for _ in range(2))
    texts = torch.nn.functional.normalize(texts + images, dim=1)
    tokens = torch.arange(40)[:, None] // 2  # two records a caption
    found = retrieval(images, texts, tokens)
    cosines = (images @ texts.T).numpy()
    captions = tokens[:, 0].numpy()
    assert found["retrieval_text"] == np.mean([captions[cosines[i].argmax()] == captions[i] for i in range(40)])
    assert found["retrieval_image"] == np.mean([captions[cosines[:, i].argmax()] == captions[i] for i in range(40)])
    assert found["retrieval_chance"] == pytest.approx(2 / 40)
    assert 0 < found["retrieval_text"] < 1


def test_zero_shot_accuracy_is_the_share_of_labels_whose_caption_is_nearest() -> None:
    """With pictures that are made to lie where CLIP has the captions of these labels."""
    torch.manual_seed(0)
    clip = tiny_architecture().build().eval()
    labels = ["dog", "cat", "dog", "owl", "dog"]
    seen = ["dog", "cat", "owl", "owl", "cat"]
    images = clip.encode_text(clip.tokenize([f"a photo of a {label}." for label in seen]))
    found = zero_shot(clip, images, labels, "a photo of a {}.")
    assert found == {
        "zero_shot": pytest.approx(3 / 5),
        "zero_shot_chance": pytest.approx(1 / 3),
        "zero_shot_most_frequent": pytest.approx(3 / 5),
    }
