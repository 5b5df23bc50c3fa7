"""A pipeline whose decoder is an exact network, so that what manipulations promise can be held against closed forms."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from tests.support.gaussian import as_prediction, rowwise
from torch import nn

from unclip.models.decoder import DecoderCondition
from unclip.pipelines.pipeline import Pipeline
from unclip.pipelines.stages import DecoderStage, StageConfig
from unclip.utils.random import SampleGenerator

VARIANCE = 0.1


class ExactDecoder(nn.Module):
    """The network of pictures whose pixels are N(mean of the channel, VARIANCE), the means read off z_i; 0 without."""

    def __init__(self, config) -> None:
        super().__init__()
        self.process = config.diffusion.build()
        self.weight = nn.Parameter(torch.ones(()))

    def prepare(self, cond: DecoderCondition) -> DecoderCondition:
        return cond

    def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor, cond: DecoderCondition) -> torch.Tensor:
        means = torch.where(cond.image.dropped[:, None], 0.0, 0.3 * cond.image.embed[:, :3])[:, :, None, None]
        abar = rowwise(self.process.alphas_cumprod(timesteps), x_t)
        gain = abar.sqrt() * VARIANCE / (abar * VARIANCE + 1 - abar)
        x_start = means + gain * (x_t - abar.sqrt() * means)
        return as_prediction(self.process, x_start, x_t, timesteps)


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_bundle: str) -> Pipeline:
    """All stages of the tiny bundle."""
    return Pipeline.from_bundle(tiny_bundle)


@pytest.fixture(scope="session")
def exact_pipeline(tiny_pipeline: Pipeline, tiny_configs: Mapping[str, StageConfig]) -> Pipeline:
    """The tiny bundle's CLIP, prior and first upsampler around an exact decoder."""
    config = tiny_configs["decoder"].merged(
        {
            "model": {"unet": {"out_channels": 3}},
            "diffusion": {"variance_type": "fixed_small", "num_train_timesteps": 1000, "clip_sample_range": None},
        }
    )
    return Pipeline(
        DecoderStage(config, ExactDecoder(config)),  # type: ignore[arg-type]
        clip=tiny_pipeline.clip,
        prior=tiny_pipeline.prior,
        upsamplers={"upsampler_256": tiny_pipeline.upsamplers["upsampler_256"]},
    )


@pytest.fixture(scope="session")
def drawings() -> np.ndarray:
    """Three pictures uint8 (3, 32, 32, 3) of moderate contrast: inside the range that pixels of 8 bits have."""
    values = SampleGenerator.for_samples(5, torch.arange(3)).normal((8, 8, 3)) * 30 + 120
    return values.clamp(20, 235).to(torch.uint8).numpy().repeat(4, axis=1).repeat(4, axis=2)
