"""Pictures between networks, which see [-1, 1], and everything else, which sees 8-bit RGB."""

from __future__ import annotations

import torch

from unclip.utils.random import SampleGenerator

PICTURE_CHANNELS = 3


def to_uint8(pictures: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3), rounded to the nearest of the 256 values."""
    return pictures.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_signed(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1], channels last in memory: the inverse of `to_uint8`."""
    return pictures.permute(0, 3, 1, 2).to(torch.float32).div(127.5).sub(1)


def picture_noise(generator: SampleGenerator, size: int) -> torch.Tensor:
    """(B, 3, size, size) standard normal, channels last in memory."""
    return generator.normal((PICTURE_CHANNELS, size, size)).contiguous(memory_format=torch.channels_last)
