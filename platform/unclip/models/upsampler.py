"""The upsamplers: low-resolution picture -> high-resolution picture, by convolutions only (unCLIP, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import model_validator
from torch import nn
from torch.nn import functional

from unclip.config.base import Config
from unclip.models.condition import Condition, PreparedCondition
from unclip.models.layers import TimestepMLP
from unclip.models.unet import UNetCondition, UNetConfig

_PICTURE_CHANNELS = 3

Resize = Literal["bilinear", "bicubic"]
"""How the low-resolution picture is brought to the size of x_t; bicubic with antialiasing, as Karlo does."""


class UpsamplerConfig(Config):
    """Shape of an upsampler."""

    unet: UNetConfig
    """the network: 6 input channels, which are the noised picture and the upsampled low-resolution one; no attention"""
    resize: Resize = "bilinear"
    """how the low-resolution picture is brought to the size of the large one; bicubic with antialiasing, as Karlo does"""
    last_step: bool = False
    """True: a second network of the same shape takes the step to the clean picture, at timestep 0 (Karlo)"""
    noise_conditioning: bool = False
    """True: noise is added to the low-resolution picture, and the network is told how much (Ho et al. 2022, "Cascaded
    diffusion models": conditioning augmentation)"""

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

    low_res: (B, 3, H, W) around [-1, 1], the low-resolution picture (or crop) at the size of x_t, as `upsample_low_res`
        makes it.
    noise_level: (B,) int64, the timestep whose noise it has; None without noise conditioning.
    """

    low_res: torch.Tensor
    noise_level: torch.Tensor | None = None

    def unconditional(self) -> UpsamplerCondition:
        raise ValueError("upsamplers have no unconditional branch: guidance_scale must be 1.0")


@dataclass(frozen=True)
class PreparedUpsamplerCondition(PreparedCondition):
    """An `UpsamplerCondition` after `UpsamplerModel.prepare`."""

    low_res: torch.Tensor
    unet: UNetCondition


def upsample_low_res(low_res: torch.Tensor, size: tuple[int, int], resize: Resize = "bilinear") -> torch.Tensor:
    """(B, 3, h, w) -> (B, 3, *size): the low-resolution condition as the network sees it, everywhere."""
    return functional.interpolate(
        low_res.float(), size=size, mode=resize, align_corners=False, antialias=resize == "bicubic"
    )


class UpsamplerModel(nn.Module):
    """A U-Net over the noised picture and the upsampled low-resolution picture; it takes pictures of any size."""

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        unet = config.unet
        self.unet = unet.build()
        self.last_unet = unet.build() if config.last_step else None
        self.level_embed = TimestepMLP(unet.channels, unet.embedding_dim) if config.noise_conditioning else None

    def prepare(self, cond: UpsamplerCondition) -> PreparedUpsamplerCondition:
        """The condition with the noise level embedded; `ValueError` where it has none and needs one, or vice versa."""
        if (cond.noise_level is None) != (self.level_embed is None):
            raise ValueError(
                f"noise_level is {'missing' if cond.noise_level is None else 'given'}, "
                f"but noise_conditioning = {self.config.noise_conditioning}"
            )
        embedding = None
        if cond.noise_level is not None and self.level_embed is not None:
            embedding = self.level_embed(cond.noise_level, self.unet.stem.weight.dtype)
        return PreparedUpsamplerCondition(cond.low_res, self.unet.prepare(embedding))

    def forward(
        self, x_t: torch.Tensor, timesteps: torch.Tensor, cond: UpsamplerCondition | PreparedUpsamplerCondition
    ) -> torch.Tensor:
        """The model output (B, unet.out_channels, H, W), float32.

        Args:
            x_t: (B, 3, H, W), the noised picture.
            timesteps: (B,), 0 = least noise.
            cond: see `UpsamplerCondition`; prepared or not, the output is the same.
        """
        if cond.low_res.shape != x_t.shape:
            raise ValueError(f"low_res has shape {tuple(cond.low_res.shape)}, but x_t {tuple(x_t.shape)}")
        prepared = self.prepare(cond) if isinstance(cond, UpsamplerCondition) else cond
        x = torch.cat([x_t.float(), cond.low_res], dim=1)
        return self._denoised(x, timesteps, prepared.unet)

    def _denoised(self, x: torch.Tensor, timesteps: torch.Tensor, cond: UNetCondition) -> torch.Tensor:
        """Each sample through the network of its timestep."""
        last = timesteps == 0
        if self.last_unet is None or not bool(last.any()):
            result: torch.Tensor = self.unet(x, timesteps, cond)
            return result
        if bool(last.all()):
            ended: torch.Tensor = self.last_unet(x, timesteps, cond)
            return ended
        order = torch.cat([(~last).nonzero()[:, 0], last.nonzero()[:, 0]])
        first, final = order[: int((~last).sum())], order[int((~last).sum()) :]
        parts = [
            network(x[rows], timesteps[rows], cond.select(rows))
            for network, rows in ((self.unet, first), (self.last_unet, final))
        ]
        return torch.cat(parts)[order.argsort()]
