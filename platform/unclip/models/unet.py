"""The ADM/GLIDE U-Net (Dhariwal and Nichol 2021, section 3 and appendix; Nichol et al. 2021, section 4).

Shapes: B batch, C channels, H and W height and width, E = 4 * channels the embedding's width, L and D length and width
of the context. The net is fully convolutional where `attention_resolutions` is empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, cast

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional

from unclip.config.base import Config
from unclip.models.condition import PreparedCondition
from unclip.models.fused import Resample, SiluConv2d, resampled
from unclip.models.layers import (
    Depth,
    TimestepMLP,
    attention,
    group_norm,
    merge_heads,
    run_block,
    split_heads,
    zero_init,
)


class UNetConfig(Config):
    """Shape of a U-Net."""

    in_channels: int = Field(default=3, ge=1)
    """channels of the input, the noised picture and whatever is stacked on it"""
    out_channels: int = Field(default=3, ge=1)
    """channels of the output; twice those of the picture where the variance is learned"""
    channels: int = Field(ge=2, multiple_of=2)
    """base width; level i is channels * channel_mult[i] wide, the time embedding 4 * channels"""
    channel_mult: tuple[int, ...] = Field(min_length=1)
    """width of each level in units of `channels`; each level halves the resolution of the one before"""
    depth: Depth
    """residual blocks of a level on the way down; one more on the way up"""
    attention_resolutions: tuple[int, ...] = ()
    """side lengths of the feature maps with attention, for pictures of `image_size`; none means no attention at all"""
    head_channels: int = Field(default=64, ge=1)
    """width of an attention head"""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """share of activations dropped before each block's last convolution while training"""
    scale_shift_norm: bool = True
    """True: the time embedding scales and shifts behind the second normalisation (AdaGN); False: it is added before"""
    patch_size: int = Field(default=1, ge=1)
    """side length of the pixel patches folded into channels at the stem and unfolded at the head: a cheaper net"""
    image_size: int = Field(ge=1)
    """side length in pixels of the pictures that `attention_resolutions` refers to"""
    activation_checkpointing: bool = False
    """compute activations again in the backward pass instead of keeping them: less memory, a third more work"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(mult < 1 for mult in self.channel_mult):
            raise ValueError(f"channel_mult = {self.channel_mult}: every factor must be at least 1")
        if self.image_size % self.stride:
            raise ValueError(
                f"image_size = {self.image_size}: must be a multiple of {self.stride}, "
                f"which is patch_size = {self.patch_size} times 2 for each of {len(self.channel_mult) - 1} halvings"
            )
        sizes = [self.image_size // self.patch_size >> level for level in range(len(self.channel_mult))]
        for resolution in self.attention_resolutions:
            if resolution not in sizes:
                raise ValueError(f"attention_resolutions: {resolution} is none of this net's feature maps, {sizes}")
            width = self.widths[sizes.index(resolution)]
            if width % self.head_channels:
                raise ValueError(f"head_channels = {self.head_channels}: does not divide width {width} at {resolution}")
        if self.attention_resolutions and self.widths[-1] % self.head_channels:
            raise ValueError(f"head_channels = {self.head_channels}: does not divide the middle, {self.widths[-1]}")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.channels * mult for mult in self.channel_mult)

    @property
    def embedding_dim(self) -> int:
        """Width of the time embedding and of whatever is added to it."""
        return 4 * self.channels

    @property
    def stride(self) -> int:
        """Heights and widths of inputs must be multiples of this."""
        return self.patch_size << (len(self.channel_mult) - 1)

    def attends(self, level: int) -> bool:
        """Whether the feature maps of `level` have attention."""
        return self.image_size // self.patch_size >> level in self.attention_resolutions

    def build(self, context_dim: int | None = None) -> UNet:
        """The net with random weights; with `context_dim`, its attention also looks at a context of that width."""
        return UNet(self, context_dim)


class AdaptiveGroupNorm(nn.GroupNorm):
    """GN(x) * (1 + scale) + shift (ADM, section 3), in one pass over x.

    All samples' channels are normalised side by side, as those of one sample with B times the groups: so each sample has
    gains and biases of its own, and what comes out of the normalisation is neither written nor kept for the gradient.
    """

    def __init__(self, channels: int) -> None:
        plain = group_norm(channels)
        super().__init__(plain.num_groups, channels, eps=plain.eps)

    def forward(self, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """x: (B, C, H, W); scale, shift: (B, C)."""
        gain = 1 + scale
        if x.is_cpu and not x.is_contiguous():  # channels last: laying them side by side would take a copy
            normalised = super().forward(x)
            out = None if torch.is_grad_enabled() else normalised
            return torch.addcmul(shift[:, :, None, None], normalised, gain[:, :, None, None], out=out)
        weight, bias = (self.weight * gain).flatten(), torch.addcmul(shift, self.bias, gain).flatten()
        side_by_side = x.reshape(1, -1, *x.shape[2:])
        groups = x.shape[0] * self.num_groups
        return functional.group_norm(side_by_side, groups, weight, bias, self.eps).view(x.shape)


class ResidualBlock(nn.Module):
    """GN, SiLU, 3x3; time embedding; GN, SiLU, dropout, 3x3 (zero at first), added to the input.

    With `resample` both branches are halved (average) or doubled (nearest) before the first convolution, as in BigGAN.
    """

    def __init__(self, in_channels: int, out_channels: int, *, config: UNetConfig, resample: Resample = "no") -> None:
        super().__init__()
        self.resample = resample
        self.norm_in = group_norm(in_channels)
        self.conv_in = SiluConv2d(in_channels, out_channels)
        self.embedding = nn.Linear(config.embedding_dim, out_channels * (2 if config.scale_shift_norm else 1))
        self.norm_out = AdaptiveGroupNorm(out_channels) if config.scale_shift_norm else group_norm(out_channels)
        self.conv_out = zero_init(SiluConv2d(out_channels, out_channels, config.dropout))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W); embedding: (B, E), SiLU already applied."""
        h = self.conv_in(self.norm_in(x), self.resample)
        time = self.embedding(embedding)
        if isinstance(self.norm_out, AdaptiveGroupNorm):
            h = self.norm_out(h, *time.chunk(2, dim=1))
        else:
            h = self.norm_out(h.add_(time[:, :, None, None]))
        return self.conv_out(h).add_(self.skip(resampled(x, self.resample)))


@dataclass(frozen=True)
class UNetCondition(PreparedCondition):
    """What a U-Net is told besides x_t and the timesteps, as `UNet.prepare` makes it; without fields: nothing.

    embedding: (B, E), added to the time embedding.
    context: for each layer of the net, in its order, the context's keys and values in the layer's attention,
        (B, heads, L, 2 * head_channels), None where it has none; empty without a context.
    context_mask: (B, L) bool, True where the context may be looked at; None = everywhere.
    """

    embedding: torch.Tensor | None = None
    context: tuple[torch.Tensor | None, ...] = ()
    context_mask: torch.Tensor | None = None


_NOTHING = UNetCondition()


class SpatialAttention(nn.Module):
    """Every position looks at the context and all positions in one softmax, context first (GLIDE, section 4.1)."""

    def __init__(self, channels: int, *, head_channels: int, context_dim: int | None) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.context_kv = None if context_dim is None else nn.Linear(context_dim, 2 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def keys_values(self, context: torch.Tensor) -> torch.Tensor:
        """(B, L, D) context -> (B, heads, L, 2 * head_channels): its keys and values side by side."""
        assert self.context_kv is not None
        return split_heads(self.context_kv(context), self.heads, 1)[0]

    def forward(self, x: torch.Tensor, context: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor:
        """x: (B, C, H, W); context: from `keys_values`; mask: (B, L) bool, True where the context may be looked at."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        query, key, value = split_heads(self.qkv(tokens), self.heads, 3)
        if context is not None:
            context_key, context_value = context.chunk(2, dim=-1)
            key, value = torch.cat([context_key, key], dim=2), torch.cat([context_value, value], dim=2)
        if mask is not None:
            mask = functional.pad(mask, (0, tokens.shape[1]), value=True)[:, None, None, :]
        attended = attention(query, key, value, mask)
        return x + self.out(merge_heads(attended)).transpose(1, 2).reshape(x.shape)


class UNetLayer(nn.Module):
    """One step of the net: a residual block, then attention and resampling where there are any."""

    def __init__(
        self, residual: ResidualBlock, attention: SpatialAttention | None = None, resample: ResidualBlock | None = None
    ) -> None:
        super().__init__()
        self.residual = residual
        self.attention = attention
        self.resample = resample

    def forward(
        self, x: torch.Tensor, embedding: torch.Tensor, context: torch.Tensor | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        x = self.residual(x, embedding)
        if self.attention is not None:
            x = self.attention(x, context, mask)
        return x if self.resample is None else self.resample(x, embedding)


class UNet(nn.Module):
    """The network of decoder and upsamplers; its output is zero before training."""

    def __init__(self, config: UNetConfig, context_dim: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.context_dim = context_dim
        widths, patch_pixels = config.widths, config.patch_size**2
        self.time_embed = TimestepMLP(config.channels, config.embedding_dim)
        self.stem = nn.Conv2d(config.in_channels * patch_pixels, widths[0], 3, padding=1)
        self.down, skips = self._down_path()
        self.middle = nn.ModuleList(
            [
                self._layer(widths[-1], widths[-1], attend=bool(config.attention_resolutions)),
                self._layer(widths[-1], widths[-1]),
            ]
        )
        self.up = self._up_path(skips)
        self.head_norm = group_norm(widths[0])
        self.head = zero_init(SiluConv2d(widths[0], config.out_channels * patch_pixels))

    def prepare(
        self,
        embedding: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
    ) -> UNetCondition:
        """What `forward` is told, with all that does not depend on x_t and the timesteps computed.

        Args:
            embedding: (B, E), added to the time embedding.
            context: (B, L, context_dim), further keys and values for every attention.
            context_mask: (B, L) bool, True where the context may be looked at; None = everywhere.

        Raises:
            ValueError: where context and `context_dim` do not go together.
        """
        if (context is None) != (self.context_dim is None):
            raise ValueError(
                f"context is {'missing' if context is None else 'given'}, but context_dim = {self.context_dim}"
            )
        dtype = self.stem.weight.dtype
        keys_values: list[torch.Tensor | None] = []
        if context is not None:
            context = context.to(dtype)
            attentions = [layer.attention for layer in self._layers()]
            keys_values = [None if attention is None else attention.keys_values(context) for attention in attentions]
        return UNetCondition(None if embedding is None else embedding.to(dtype), tuple(keys_values), context_mask)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, cond: UNetCondition = _NOTHING) -> torch.Tensor:
        """The model output (B, out_channels, H, W), float32.

        Args:
            x: (B, in_channels, H, W); H and W are multiples of `config.stride`.
            timesteps: (B,), 0 = least noise.
            cond: see `prepare`.

        Raises:
            ValueError: where a picture cannot be halved often enough, or context and `context_dim` do not go together.
        """
        self._check(x, cond)
        dtype = self.stem.weight.dtype
        time = self.time_embed(timesteps, dtype)
        time = functional.silu(time if cond.embedding is None else time + cond.embedding)
        h = functional.pixel_unshuffle(x.to(dtype), self.config.patch_size)
        # Tensor cores want channels last. On CPUs most sampling is a tenth faster with it, and training up to a tenth slower.
        layout = torch.channels_last if h.is_cuda or not torch.is_grad_enabled() else torch.contiguous_format
        h = self._run_layers(self.stem(h.contiguous(memory_format=layout)), time, cond)
        h = functional.pixel_shuffle(self.head(self.head_norm(h)), self.config.patch_size)
        return h.to(torch.float32, memory_format=torch.contiguous_format)

    def _run_layers(self, h: torch.Tensor, time: torch.Tensor, cond: UNetCondition) -> torch.Tensor:
        layers, skips = self._layers(), [h]
        recompute, mask = self.config.activation_checkpointing, cond.context_mask
        for index, (layer, context) in enumerate(zip(layers, cond.context or (None,) * len(layers), strict=True)):
            if index >= len(layers) - len(self.up):
                h = torch.cat([h, skips.pop()], dim=1)
            h = run_block(layer, h, time, context, mask, recompute=recompute)
            if index < len(self.down):
                skips.append(h)
        return h

    def _layers(self) -> list[UNetLayer]:
        return cast("list[UNetLayer]", [*self.down, *self.middle, *self.up])

    def _check(self, x: torch.Tensor, cond: UNetCondition) -> None:
        height, width = x.shape[-2:]
        if height % self.config.stride or width % self.config.stride:
            raise ValueError(f"picture of {height} x {width} pixels: both must be multiples of {self.config.stride}")
        if bool(cond.context) != (self.context_dim is not None):
            raise ValueError(
                f"context is {'given' if cond.context else 'missing'}, but context_dim = {self.context_dim}"
            )

    def _layer(self, in_channels: int, out_channels: int, *, attend: bool = False, upsample: bool = False) -> UNetLayer:
        config, attention = self.config, None
        if attend:
            attention = SpatialAttention(out_channels, head_channels=config.head_channels, context_dim=self.context_dim)
        resample = ResidualBlock(out_channels, out_channels, config=config, resample="up") if upsample else None
        return UNetLayer(ResidualBlock(in_channels, out_channels, config=config), attention, resample)

    def _down_path(self) -> tuple[nn.ModuleList, list[int]]:
        """The layers on the way down, and the widths of the activations kept for the way up."""
        layers, widths = nn.ModuleList(), self.config.widths
        skips = [widths[0]]
        for level, width in enumerate(widths):
            for _ in range(self.config.depth):
                layers.append(self._layer(skips[-1], width, attend=self.config.attends(level)))
                skips.append(width)
            if level < len(widths) - 1:
                layers.append(UNetLayer(ResidualBlock(width, width, config=self.config, resample="down")))
                skips.append(width)
        return layers, skips

    def _up_path(self, skips: list[int]) -> nn.ModuleList:
        layers, widths = nn.ModuleList(), self.config.widths
        current, skips = widths[-1], list(skips)
        for level, width in reversed(list(enumerate(widths))):
            for index in range(self.config.depth + 1):
                upsample = level > 0 and index == self.config.depth
                attend = self.config.attends(level)
                layers.append(self._layer(current + skips.pop(), width, attend=attend, upsample=upsample))
                current = width
        return layers
