"""The noised classifier: which class a noised picture belongs to (Dhariwal and Nichol 2021, section 4 and appendix).

"The classifier architecture is simply the downsampling trunk of the UNet model with an attention pool at the 8x8 layer to
produce the final output": blocks and time embedding are those of `unet.py`, the pool is CLIP's (Radford et al. 2021).
Shapes: B batch, K classes, C channels, P positions of the smallest feature map.
"""

from __future__ import annotations

from typing import Self

import torch
from pydantic import model_validator
from torch import nn
from torch.nn import functional

from unclip.config.base import Config
from unclip.models.layers import TimestepMLP, attention, group_norm, merge_heads, run_block, split_heads
from unclip.models.unet import ResidualBlock, SpatialAttention, UNetConfig, UNetLayer


class ClassifierConfig(Config):
    """Shape of a noised classifier."""

    encoder: UNetConfig
    """the U-Net whose way down and middle it is; without a way up, out_channels stays what in_channels is"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        encoder = self.encoder
        if encoder.out_channels != encoder.in_channels:
            raise ValueError(
                f"encoder.out_channels = {encoder.out_channels}: a classifier puts out no picture; "
                f"leave it at encoder.in_channels = {encoder.in_channels}"
            )
        if encoder.widths[-1] % encoder.head_channels:
            raise ValueError(
                f"encoder.head_channels = {encoder.head_channels}: does not divide the pool's width {encoder.widths[-1]}"
            )
        return self

    def build(self, num_classes: int) -> ClassifierModel:
        """The model with random weights."""
        return ClassifierModel(self, num_classes)


class AttentionPool(nn.Module):
    """The mean of all positions looks at itself and at all positions: (B, C, H, W) -> (B, out_width)."""

    no_decay = ("positions",)

    def __init__(self, channels: int, out_width: int, *, side: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.positions = nn.Parameter(torch.empty(1 + side**2, channels))
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(channels, 2 * channels)
        self.out = nn.Linear(channels, out_width)
        nn.init.normal_(self.positions, std=channels**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) + self.positions
        query = split_heads(self.query(tokens[:, :1]), self.heads, 1)[0]
        key, value = split_heads(self.key_value(tokens), self.heads, 2)
        result: torch.Tensor = self.out(merge_heads(attention(query, key, value))[:, 0])
        return result


class ClassifierModel(nn.Module):
    """Noised picture and timestep -> logits of the classes."""

    def __init__(self, config: ClassifierConfig, num_classes: int) -> None:
        super().__init__()
        encoder = self.encoder = config.encoder
        self.time_embed = TimestepMLP(encoder.channels, encoder.embedding_dim)
        self.stem = nn.Conv2d(encoder.in_channels * encoder.patch_size**2, encoder.widths[0], 3, padding=1)
        self.layers = nn.ModuleList([*self._way_down(), *self._middle()])
        self.norm = group_norm(encoder.widths[-1])
        self.pool = AttentionPool(
            encoder.widths[-1],
            num_classes,
            side=encoder.image_size // encoder.stride,
            heads=encoder.widths[-1] // encoder.head_channels,
        )

    def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Logits (B, K), float32 or wider.

        Args:
            x_t: (B, in_channels, S, S), the noised picture, S = `image_size`.
            timesteps: (B,), 0 = least noise.

        Raises `ValueError` where the picture has another size.
        """
        side = self.encoder.image_size
        if x_t.shape[1:] != (self.encoder.in_channels, side, side):
            raise ValueError(f"x_t is {tuple(x_t.shape)}: expected (B, {self.encoder.in_channels}, {side}, {side})")
        dtype = self.stem.weight.dtype
        time = functional.silu(self.time_embed(timesteps, dtype))
        h = self.stem(functional.pixel_unshuffle(x_t.to(dtype), self.encoder.patch_size))
        for layer in self.layers:
            h = run_block(layer, h, time, None, None, recompute=self.encoder.activation_checkpointing)
        logits: torch.Tensor = self.pool(functional.silu(self.norm(h)))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _way_down(self) -> list[UNetLayer]:
        layers, widths = [], self.encoder.widths
        current = widths[0]
        for level, width in enumerate(widths):
            for _ in range(self.encoder.depth):
                layers.append(self._layer(current, width, attend=self.encoder.attends(level)))
                current = width
            if level < len(widths) - 1:
                layers.append(UNetLayer(ResidualBlock(width, width, config=self.encoder, resample="down")))
        return layers

    def _middle(self) -> list[UNetLayer]:
        width = self.encoder.widths[-1]
        return [
            self._layer(width, width, attend=bool(self.encoder.attention_resolutions)),
            self._layer(width, width, attend=False),
        ]

    def _layer(self, in_channels: int, out_channels: int, *, attend: bool) -> UNetLayer:
        residual = ResidualBlock(in_channels, out_channels, config=self.encoder)
        if not attend:
            return UNetLayer(residual)
        head_channels = self.encoder.head_channels
        return UNetLayer(residual, SpatialAttention(out_channels, head_channels=head_channels, context_dim=None))
