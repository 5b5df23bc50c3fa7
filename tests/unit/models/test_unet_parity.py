"""Our U-Net and diffusers' with the same random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from unclip.models.unet import ResidualBlock, UNet, UNetConfig

RESIDUAL = {
    "norm_in": "norm1",
    "conv_in": "conv1",
    "embedding": "time_emb_proj",
    "norm_out": "norm2",
    "conv_out": "conv2",
    "skip": "conv_shortcut",
}


def pairs(ours: UNet, theirs: UNet2DModel) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Modules of both nets that must hold the same weights."""
    yield ours.stem, theirs.conv_in
    yield ours.time_embed.layers[0], theirs.time_embedding.linear_1
    yield ours.time_embed.layers[2], theirs.time_embedding.linear_2
    yield ours.head_norm, theirs.conv_norm_out
    yield ours.head, theirs.conv_out
    own = [module for module in ours.modules() if isinstance(module, ResidualBlock)]
    other = []
    for block in theirs.down_blocks:
        other += [*block.resnets, *(block.downsamplers or [])]
    other += list(theirs.mid_block.resnets)
    for block in theirs.up_blocks:
        other += [*block.resnets, *(block.upsamplers or [])]
    for mine, its in zip(own, other, strict=True):
        yield from ((getattr(mine, a), getattr(its, b)) for a, b in RESIDUAL.items() if getattr(its, b) is not None)


@pytest.mark.parametrize("scale_shift_norm", [False, True])
def test_upsampler_net_equals_diffusers(randomized: Callable[[nn.Module], nn.Module], scale_shift_norm: bool) -> None:
    config = UNetConfig(
        in_channels=6,
        channels=128,  # the narrowest at which 32 groups hold four channels, as diffusers has 32 in all layers
        channel_mult=(1, 2),
        depth=1,
        scale_shift_norm=scale_shift_norm,
        image_size=16,
    )
    ours = randomized(config.build())
    theirs = UNet2DModel(
        in_channels=6,
        out_channels=3,
        down_block_types=("ResnetDownsampleBlock2D",) * 2,
        up_block_types=("ResnetUpsampleBlock2D",) * 2,
        block_out_channels=(128, 256),
        layers_per_block=1,
        add_attention=False,
        resnet_time_scale_shift="scale_shift" if scale_shift_norm else "default",
    ).eval()
    for mine, its in pairs(ours, theirs):
        its.load_state_dict(mine.state_dict())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    x, timesteps = torch.randn(2, 6, 16, 24, generator=torch.Generator().manual_seed(0)), torch.tensor([17, 999])
    with torch.no_grad():
        expected = theirs(x, timesteps).sample
        torch.testing.assert_close(ours(x, timesteps), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
