"""What the configurations of several stages refuse, and what their networks are asked for."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from unclip.diffusion.process import DiffusionConfig
from unclip.models.normalizer import EmbeddingNormalizerConfig
from unclip.models.unet import UNetConfig
from unclip.pipelines.pictures import PICTURE_CHANNELS

M = TypeVar("M", bound=nn.Module)
_UNIT_TOLERANCE = 0.01
"""More than what is left of a norm in float16 or bfloat16."""


def check_normalizer(normalizer: EmbeddingNormalizerConfig, embed_dim: int) -> None:
    for name in ("mean", "std"):
        value = getattr(normalizer, name)
        if isinstance(value, tuple) and len(value) != embed_dim:
            raise ValueError(f"normalizer.{name}: has {len(value)} numbers for model.embed_dim = {embed_dim}")


def check_channels(unet: UNetConfig, diffusion: DiffusionConfig, *, in_channels: int) -> None:
    learned = diffusion.variance_type == "learned_range"
    out_channels = PICTURE_CHANNELS * (2 if learned else 1)
    if unet.in_channels != in_channels:
        raise ValueError(f"model.unet.in_channels = {unet.in_channels}: must be {in_channels} in this stage")
    if unet.out_channels != out_channels:
        raise ValueError(
            f"model.unet.out_channels = {unet.out_channels}: must be {out_channels} with "
            f"diffusion.variance_type = {diffusion.variance_type!r}"
        )


def check_size(size: int, unet: UNetConfig) -> None:
    if size % unet.stride:
        raise ValueError(f"image_size = {size}: must be a multiple of {unet.stride}, the stride of model.unet")


def check_unit_norm(name: str, embed: torch.Tensor) -> None:
    """Raises `ValueError` where one of `embed` (B, D) is no unit vector: other scales would be sampled from in silence."""
    norms = embed.float().norm(dim=1)
    if not bool(((norms - 1).abs() < _UNIT_TOLERANCE).all()):
        raise ValueError(f"{name} must be of unit norm, but has norms from {norms.min():.3g} to {norms.max():.3g}")


def check_signed(name: str, pictures: torch.Tensor) -> None:
    """Raises `ValueError` where `pictures` leave [-1, 1], as those in 0..255 do."""
    if not bool((pictures.abs() <= 1).all()):
        raise ValueError(f"{name} must be in [-1, 1], but is in [{pictures.min():.3g}, {pictures.max():.3g}]")


def channels_last(model: M) -> M:
    """The same network with its convolutions' weights in the layout that they are fastest in."""
    return model.to(memory_format=torch.channels_last)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
