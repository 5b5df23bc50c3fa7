"""The upsamplers: low-resolution picture -> high-resolution picture, by convolutions only (unCLIP, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from pydantic import model_validator
from torch import nn
from torch.nn import functional

from unclip.config.base import Config
from unclip.models.condition import Condition
from unclip.models.unet import UNetConfig

_PICTURE_CHANNELS = 3


class UpsamplerConfig(Config):
    """Shape of an upsampler."""

    unet: UNetConfig
    """the network: 6 input channels, which are the noised picture and the upsampled low-resolution one; no attention"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.unet.attention_resolutions:
            raise ValueError(
                f"unet.attention_resolutions = {self.unet.attention_resolutions}: must be empty, "
                "since an upsampler is trained on crops and sampled at full size"
            )
        if self.unet.in_channels != 2 * _PICTURE_CHANNELS:
            raise ValueError(f"unet.in_channels = {self.unet.in_channels}: must be {2 * _PICTURE_CHANNELS}")
        return self

    def build(self) -> UpsamplerModel:
        """The model with random weights."""
        return UpsamplerModel(self)


@dataclass(frozen=True)
class UpsamplerCondition(Condition):
    """What an upsampler is told.

    low_res: (B, 3, h, w) in [-1, 1], the picture (or crop) at low resolution.
    """

    low_res: torch.Tensor

    def unconditional(self) -> UpsamplerCondition:
        raise ValueError("upsamplers have no unconditional branch: guidance_scale must be 1.0")


def upsample_low_res(low_res: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, 3, h, w) -> (B, 3, *size) bilinear: the low-resolution condition as the network sees it, everywhere."""
    return functional.interpolate(low_res.float(), size=size, mode="bilinear", align_corners=False)


class UpsamplerModel(nn.Module):
    """A U-Net over the noised picture and the upsampled low-resolution picture; it takes pictures of any size."""

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.unet = config.unet.build()

    def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor, cond: UpsamplerCondition) -> torch.Tensor:
        """The model output (B, unet.out_channels, H, W), float32.

        Args:
            x_t: (B, 3, H, W), the noised picture.
            timesteps: (B,), 0 = least noise.
            cond: see `UpsamplerCondition`.
        """
        low_res = upsample_low_res(cond.low_res, (x_t.shape[-2], x_t.shape[-1]))
        result: torch.Tensor = self.unet(torch.cat([x_t.float(), low_res], dim=1), timesteps)
        return result
