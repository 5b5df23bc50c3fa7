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
from unclip.recipes.decoder import RECIPES

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
VOCABULARY = 850 * 2048 / 1e6


def millions(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def test_decoder() -> None:
    with torch.device("meta"):
        model = DECODER.build()
    image, text = model.conditioners["image"], model.conditioners["text"]
    # GLIDE's vocabulary is 50258 tokens, CLIP's 49408: 850 rows of 2048 fewer.
    assert millions(text.transformer) == pytest.approx(1312.6 - VOCABULARY, abs=0.1)
    # What unCLIP adds to GLIDE is the way of z_i into time embedding and context.
    added = millions(image.to_time) + millions(image.to_tokens)
    assert millions(model) - added == pytest.approx(3554.9 - VOCABULARY, abs=0.2)
    assert millions(model) == pytest.approx(3554.9, rel=0.005)


def test_glide_is_the_decoder_without_the_image_embedding() -> None:
    with torch.device("meta"):
        model = DecoderConfig(unet=DECODER.unet, text=TEXT).build()
    assert millions(model) == pytest.approx(3554.9 - VOCABULARY, abs=0.2)


def test_adm() -> None:
    """ImageNet-64 of Dhariwal and Nichol 2021, Table 11: 296M, without the null class of guidance."""
    unet = UNetConfig(
        out_channels=6,
        channels=192,
        channel_mult=(1, 2, 3, 4),
        depth=3,
        attention_resolutions=(32, 16, 8),
        image_size=64,
    )
    with torch.device("meta"):
        model = DecoderConfig(unet=unet, num_classes=1000).build()
    assert millions(model) - 4 * 192 / 1e6 == pytest.approx(295.9, abs=0.05)


def test_noise_conditioning_adds_an_embedding_of_the_level() -> None:
    unet = UNetConfig(in_channels=6, channels=320, channel_mult=(1, 2, 3, 4), depth=3, image_size=256)
    with torch.device("meta"):
        plain, noised = UpsamplerConfig(unet=unet).build(), UpsamplerConfig(unet=unet, noise_conditioning=True).build()
    assert millions(noised) - millions(plain) == pytest.approx(millions(plain.unet.time_embed), abs=1e-6)


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


@pytest.mark.parametrize(
    ("recipe", "expected"), [("glide", 3554.9 - VOCABULARY - 2 * 128 * 2048 / 1e6), ("adm", 295.9)]
)
def test_recipes_of_the_decoders_forerunners(recipe: str, expected: float) -> None:
    """GLIDE's captions have 128 tokens where unCLIP's have 256: as many positions and padding embeddings fewer."""
    with torch.device("meta"):
        model = RECIPES[recipe]().objective.stage_config().build()
    assert millions(model) == pytest.approx(expected, abs=0.2)
