"""dalle2-pytorch's networks, run by the interpreter of its own environment (see README.md).

Its U-Net and prior have other blocks than GLIDE's, so they are fitted to our parameter count: the U-Net as wide as stays
below it, its conditioning tokens wide enough for the rest, the prior through the width of its feed-forward layers.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from benchmarks.common import parameter_count
from benchmarks.inputs import Denoise, Inputs, Side
from benchmarks.shapes import GUIDANCE_SCALE, PriorShape, Shape, UNetShape
from dalle2_pytorch.dalle2_pytorch import DiffusionPriorNetwork, Unet  # type: ignore[import-not-found]
from torch import nn

PACKAGE = "dalle2-pytorch"
_RESNET_GROUPS = 4  # widths in steps of 4 channels


def build(shape: Shape, parameters: int) -> Side:
    """The network of about `parameters` parameters."""
    if isinstance(shape, PriorShape):
        return Prior(shape, parameters)
    return Upsampler(shape, parameters) if shape.context is None else Decoder(shape, parameters)


def _count(make: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):
        return parameter_count(make())


def _unet(shape: UNetShape, dim: int, cond_dim: int) -> Unet:
    length, width = shape.context or (None, None)
    return Unet(
        dim=dim,
        cond_dim=cond_dim,
        dim_mults=shape.channel_mult,
        num_resnet_blocks=shape.depth,
        resnet_groups=_RESNET_GROUPS,
        channels=3,
        channels_out=shape.out_channels,
        self_attn=tuple(level in shape.attended_levels for level in range(len(shape.channel_mult))),
        attn_dim_head=shape.head_channels,
        attn_heads=8,
        lowres_cond=shape.context is None,
        cond_on_image_embeds=shape.context is not None,
        image_embed_dim=4 * shape.channels,
        cond_on_text_encodings=shape.context is not None,
        text_embed_dim=width,
        max_text_len=length or 1,
    )


def _fitted_unet(shape: UNetShape, parameters: int) -> Unet:
    widths = range(_RESNET_GROUPS, 4 * shape.channels, _RESNET_GROUPS)
    above = bisect.bisect_right(widths, parameters, key=lambda dim: _count(partial(_unet, shape, dim, dim)))
    dim = widths[max(0, above - 1)]
    fewer, more = (_count(partial(_unet, shape, dim, cond_dim)) for cond_dim in (dim, 2 * dim))
    cond_dim = dim + round(dim * max(0, parameters - fewer) / (more - fewer))
    return _unet(shape, dim, cond_dim)


class Upsampler:
    """The U-Net with the low-resolution picture stacked on the noised one."""

    def __init__(self, shape: UNetShape, parameters: int) -> None:
        self.module: Any = _fitted_unet(shape, parameters)

    def predict(self, inputs: Inputs) -> torch.Tensor:
        x_t, low_res = inputs.x_t.chunk(2, dim=1)
        return self.module(x_t, inputs.timesteps, image_embed=None, lowres_cond_img=low_res)

    def request(self, inputs: Inputs) -> Denoise:
        return lambda: self.predict(inputs)


class Decoder:
    """The U-Net with image embedding and text states; its guidance is two passes of the batch."""

    def __init__(self, shape: UNetShape, parameters: int) -> None:
        self.module: Any = _fitted_unet(shape, parameters)

    def predict(self, inputs: Inputs) -> torch.Tensor:
        return self.module(inputs.x_t, inputs.timesteps, image_embed=inputs.embedding, text_encodings=inputs.states)

    def request(self, inputs: Inputs) -> Denoise:
        return lambda: self.module.forward_with_cond_scale(
            inputs.x_t,
            inputs.timesteps,
            image_embed=inputs.embedding,
            text_encodings=inputs.states,
            cond_scale=GUIDANCE_SCALE,
        )


class Prior:
    """Its diffusion prior network; its guidance is two passes of the batch."""

    def __init__(self, shape: PriorShape, parameters: int) -> None:
        make = partial(self._network, shape)
        narrow, wide = (_count(partial(make, ff_mult)) for ff_mult in (2, 4))
        self.module: Any = make(2 + 2 * (parameters - narrow) / (wide - narrow))

    @staticmethod
    def _network(shape: PriorShape, ff_mult: float) -> DiffusionPriorNetwork:
        return DiffusionPriorNetwork(
            dim=shape.width,
            depth=shape.depth,
            dim_head=shape.width // shape.heads,
            heads=shape.heads,
            ff_mult=ff_mult,
            max_text_len=shape.context_length,
        )

    def predict(self, inputs: Inputs) -> torch.Tensor:
        return self.module(inputs.x_t, inputs.timesteps, text_embed=inputs.embedding, text_encodings=inputs.states)

    def request(self, inputs: Inputs) -> Denoise:
        return lambda: self.module.forward_with_cond_scale(
            inputs.x_t,
            inputs.timesteps,
            text_embed=inputs.embedding,
            text_encodings=inputs.states,
            cond_scale=GUIDANCE_SCALE,
        )
