"""Pictures between networks, which see [-1, 1], and everything else, which sees 8-bit RGB."""

from __future__ import annotations

import torch
from torch.nn import functional

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


def at_size(pictures: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 (N, H, H, 3), H a multiple of `size` -> uint8 (N, size, size, 3): the rounded mean of each block."""
    side = pictures.shape[1]
    if pictures.shape[2] != side or side % size:
        raise ValueError(f"pictures of {pictures.shape[2]}x{side} pixels cannot be scaled down evenly to {size}x{size}")
    if side == size:
        return pictures
    pixels = functional.avg_pool2d(pictures.permute(0, 3, 1, 2).double(), side // size)
    return pixels.add(0.5).floor().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
