from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from unclip.models.normalizer import EmbeddingNormalizerConfig, from_statistics, paper_scale


def test_round_trip_and_unit_variance() -> None:
    z = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5, 0.1]) + 7
    config = from_statistics(z.mean(dim=0).tolist(), z.std(dim=0).tolist())
    normalizer = EmbeddingNormalizerConfig.from_dict(json.loads(config.to_json())).build()
    scaled = normalizer.normalize(z)
    torch.testing.assert_close(scaled.mean(dim=0), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(scaled.std(dim=0), torch.ones(3))
    torch.testing.assert_close(normalizer.denormalize(scaled), z)
    assert not normalizer.state_dict()


@pytest.mark.parametrize("embed_dim", [1024, 768, 64])
def test_paper_scale_gives_components_the_spread_of_pictures(embed_dim: int) -> None:
    """unCLIP multiplies unit-norm embeddings of 1024 components by 17.2, which is 14.9 for 768."""
    z = torch.nn.functional.normalize(torch.randn(500, embed_dim, generator=torch.Generator().manual_seed(0)), dim=1)
    scaled = paper_scale(embed_dim).build().normalize(z)
    assert float(scaled.square().mean().sqrt()) == pytest.approx(17.2 / 32, rel=1e-5)
    factor = 1 / float(torch.tensor(paper_scale(embed_dim).std))
    assert factor == pytest.approx({1024: 17.2, 768: 14.9, 64: 4.3}[embed_dim], abs=0.01)


def test_input_is_left_alone() -> None:
    z = torch.ones(2, 4)
    paper_scale(4).build().normalize(z)
    torch.testing.assert_close(z, torch.ones(2, 4))


def test_components_without_signal_are_not_blown_up() -> None:
    assert from_statistics([0.0, 0.0], [2.0, 0.0]).std == (2.0, 0.002)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"std": 0.0}, "std: every value must be above 0"),
        ({"std": [1.0, -1.0]}, r"the least is -1\.0"),
        ({"std": []}, "std: every value"),
        ({"mean": [0.0], "std": [1.0, 1.0]}, "mean has 1 components, std has 2"),
        ({"std": float("nan")}, "std"),
    ],
)
def test_bad_statistics_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmbeddingNormalizerConfig.from_dict(settings)
