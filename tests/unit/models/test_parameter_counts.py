"""Parameter counts of the paper's sizes (unCLIP, Table 3) against those of the public GLIDE/ADM modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unclip.models.decoder import DecoderConfig
from unclip.models.prior import PriorConfig
from unclip.models.text import TextTransformerConfig
from unclip.models.unet import UNetConfig
from unclip.models.upsampler import UpsamplerConfig

TEXT = TextTransformerConfig(context_length=256, width=2048, depth=24, heads=32)
DECODER = DecoderConfig(
    unet=UNetConfig(
        out_channels=6,
        channels=512,
        channel_mult=(1, 2, 3, 4),
        depth=3,
        attention_resolutions=(32, 16, 8),
        dropout=0.1,
        image_size=64,
    ),
    text=TEXT,
    embed_dim=1024,
)


def millions(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def test_decoder() -> None:
    with torch.device("meta"):
        model = DECODER.build()
    # GLIDE's vocabulary is 50258 tokens, CLIP's 49408: 850 rows of 2048 fewer.
    assert millions(model.text) == pytest.approx(1312.6 - 850 * 2048 / 1e6, abs=0.1)
    # What unCLIP adds to GLIDE is the way of z_i into time embedding and context.
    added = millions(model.image_to_time) + millions(model.image_to_tokens)
    assert millions(model) - added == pytest.approx(3554.9 - 850 * 2048 / 1e6, abs=0.2)
    assert millions(model) == pytest.approx(3554.9, rel=0.005)


@pytest.mark.parametrize(("scale_shift_norm", "expected"), [(True, 729.7), (False, 691.5)])
def test_upsampler_256(scale_shift_norm: bool, expected: float) -> None:
    unet = UNetConfig(
        in_channels=6,
        channels=320,
        channel_mult=(1, 2, 3, 4),
        depth=3,
        image_size=256,
        scale_shift_norm=scale_shift_norm,
    )
    with torch.device("meta"):
        assert millions(UpsamplerConfig(unet=unet).build()) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(("scale_shift_norm", "expected"), [(True, 282.0), (False, 267.1)])
def test_upsampler_1024(scale_shift_norm: bool, expected: float) -> None:
    unet = UNetConfig(
        in_channels=6,
        channels=192,
        channel_mult=(1, 1, 2, 2, 4, 4),
        depth=2,
        image_size=1024,
        scale_shift_norm=scale_shift_norm,
    )
    with torch.device("meta"):
        assert millions(UpsamplerConfig(unet=unet).build()) == pytest.approx(expected, abs=0.1)


def test_prior() -> None:
    with torch.device("meta"):
        model = PriorConfig(embed_dim=1024, context_length=256, width=2048, depth=24, heads=32).build()
    # 1225.9 is a prior of this shape that is given 1024-wide text states: a projection of them, and no vocabulary.
    states_in, vocabulary = (1024 + 1) * 2048 / 1e6, 49408 * 2048 / 1e6
    assert millions(model) == pytest.approx(1225.9 - states_in + vocabulary, abs=0.1)
