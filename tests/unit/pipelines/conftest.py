"""A pipeline whose decoder is an exact network, so that what manipulations promise can be held against closed forms."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from tests.support.exact_decoder import exact_decoder

from unclip.pipelines.pipeline import Pipeline
from unclip.pipelines.stages import StageConfig
from unclip.utils.random import SampleGenerator


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_bundle: str) -> Pipeline:
    """All stages of the tiny bundle."""
    return Pipeline.from_bundle(tiny_bundle)


@pytest.fixture(scope="session")
def exact_pipeline(tiny_pipeline: Pipeline, tiny_configs: Mapping[str, StageConfig]) -> Pipeline:
    """The tiny bundle's CLIP, prior and first upsampler around an exact decoder."""
    return Pipeline(
        exact_decoder(tiny_configs["decoder"]),
        clip=tiny_pipeline.clip,
        prior=tiny_pipeline.prior,
        upsamplers={"upsampler_256": tiny_pipeline.upsamplers["upsampler_256"]},
    )


@pytest.fixture(scope="session")
def drawings() -> np.ndarray:
    """Three pictures uint8 (3, 32, 32, 3) of moderate contrast: inside the range that pixels of 8 bits have."""
    values = SampleGenerator.for_samples(5, torch.arange(3)).normal((8, 8, 3)) * 30 + 120
    return values.clamp(20, 235).to(torch.uint8).numpy().repeat(4, axis=1).repeat(4, axis=2)
