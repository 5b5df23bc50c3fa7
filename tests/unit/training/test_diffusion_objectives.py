"""What holds for the objectives of all diffusion stages."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.objectives import VARIANTS, D, build, decoder, make_batch, prior, streams, upsampler, variant

from unclip.config.base import ConfigError
from unclip.models.normalizer import EmbeddingNormalizerConfig
from unclip.training.objectives.decoder import DecoderObjectiveConfig
from unclip.training.objectives.prior import PriorObjectiveConfig

CONFIGS = {
    "prior": prior(),
    "decoder": decoder(),
    **{name: variant(name) for name in VARIANTS},
    "upsampler": upsampler(),
    "noised upsampler": upsampler(noise_conditioning=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_loss_is_the_mean_of_its_samples_losses(name: str) -> None:
    """So micro-batches and workers can be cut at will: what is drawn for a sample is its own."""
    objective, batch = build(CONFIGS[name]), make_batch(6)
    whole = objective.loss(objective.model, batch, streams(batch))
    singles = []
    for index in reversed(range(6)):
        single = {key: value[index : index + 1] for key, value in batch.items()}
        singles.append(objective.loss(objective.model, single, streams(single)))
    torch.testing.assert_close(whole.loss, torch.stack([single.loss for single in singles]).mean())
    for key, value in whole.metrics.items():
        torch.testing.assert_close(value, torch.stack([single.metrics[key] for single in singles]).mean())


@pytest.mark.parametrize("name", CONFIGS)
def test_inputs_stay_as_they_are(name: str) -> None:
    objective, batch = build(CONFIGS[name]), make_batch(4)
    before = {key: value.clone() for key, value in batch.items()}
    objective.loss(objective.model, batch, streams(batch)).loss.backward()
    objective.after_backward()
    assert batch.keys() == before.keys()
    assert all(torch.equal(batch[key], value) for key, value in before.items())


@pytest.mark.parametrize("config", [prior(), decoder()], ids=["prior", "decoder"])
def test_normalisers_follow_the_embeddings(config: PriorObjectiveConfig | DecoderObjectiveConfig) -> None:
    scaled = config.with_embeddings(D, None).stage.normalizer
    assert scaled == EmbeddingNormalizerConfig(mean=0.0, std=1 / (17.2 * math.sqrt(D / 1024)))
    # Of unit vectors: the squares of all means and deviations add up to 1.
    statistics = {"mean": [0.3] * D, "std": [(0.46 / (D - 1)) ** 0.5] * (D - 1) + [0.0], "count": 9}
    whitened = config.model_copy(update={"normalization": "whiten"}).with_embeddings(D, statistics).stage.normalizer
    assert whitened.mean == (0.3,) * D
    std = statistics["std"][0]
    assert whitened.std == (std,) * (D - 1) + (std / 1000,)  # a component that never moves must not blow up
    raw = {"mean": [3.0] * D, "std": [1.0] * D, "count": 9}
    for normalization in ("scale", "whiten"):
        with pytest.raises(ConfigError, match="have a mean square norm of 60, not 1"):
            config.model_copy(update={"normalization": normalization}).with_embeddings(D, raw)
