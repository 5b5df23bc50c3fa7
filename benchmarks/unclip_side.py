"""Our side of every row."""

from __future__ import annotations

import torch
from benchmarks.inputs import Denoise, Inputs, Side, guided, twice
from benchmarks.shapes import PriorShape, Shape, UNetShape

from unclip.models.prior import PriorCondition, PriorConfig
from unclip.models.unet import UNetConfig

PACKAGE = "unclip"


def build(shape: Shape, _parameters: int = 0) -> Side:
    """The network with random weights; its own size is the one that peers are fitted to."""
    if isinstance(shape, PriorShape):
        return Prior(shape)
    return Upsampler(shape) if shape.context is None else Decoder(shape)


def _unet_config(shape: UNetShape) -> UNetConfig:
    return UNetConfig(
        in_channels=shape.in_channels,
        out_channels=shape.out_channels,
        channels=shape.channels,
        channel_mult=shape.channel_mult,
        depth=shape.depth,
        attention_resolutions=tuple(shape.train.pixels >> level for level in shape.attended_levels),
        head_channels=shape.head_channels,
        scale_shift_norm=shape.context is not None,
        image_size=shape.train.pixels,
    )


class Upsampler:
    """The U-Net without attention; the time embedding is added, as the paper's parameter counts say."""

    def __init__(self, shape: UNetShape) -> None:
        self.module = _unet_config(shape).build()

    def predict(self, inputs: Inputs) -> torch.Tensor:
        return self.module(inputs.x_t, inputs.timesteps)

    def request(self, inputs: Inputs) -> Denoise:
        return lambda: self.module(inputs.x_t, inputs.timesteps)


class Decoder:
    """The U-Net behind the text transformer: an embedding and a context; its keys and values are computed once a request."""

    def __init__(self, shape: UNetShape) -> None:
        assert shape.context is not None
        self.module = _unet_config(shape).build(context_dim=shape.context[1])

    def predict(self, inputs: Inputs) -> torch.Tensor:
        told = self.module.prepare(inputs.embedding, inputs.states)
        return self.module(inputs.x_t, inputs.timesteps, told)

    def request(self, inputs: Inputs) -> Denoise:
        told = self.module.prepare(twice(inputs.embedding), twice(inputs.states))
        return lambda: guided(self.module(twice(inputs.x_t), twice(inputs.timesteps), told))


class Prior:
    """The diffusion prior, whose caption is computed once a request.

    Peers are given the caption's states where we embed tokens: with as many tokens as a state is wide, our table has the
    size of their projection.
    """

    def __init__(self, shape: PriorShape) -> None:
        self.module = PriorConfig(
            embed_dim=shape.width,
            vocab_size=shape.width,
            context_length=shape.context_length,
            width=shape.width,
            depth=shape.depth,
            heads=shape.heads,
        ).build()

    def predict(self, inputs: Inputs) -> torch.Tensor:
        return self.module(inputs.x_t, inputs.timesteps, self._condition(inputs))

    def request(self, inputs: Inputs) -> Denoise:
        cond = self._condition(inputs)
        told = self.module.prepare(cond.unconditional().cat(cond))
        return lambda: guided(self.module(twice(inputs.x_t), twice(inputs.timesteps), told))

    def _condition(self, inputs: Inputs) -> PriorCondition:
        return PriorCondition(
            text_embed=inputs.embedding,
            tokens=inputs.tokens,
            text_mask=torch.ones_like(inputs.tokens, dtype=torch.bool),
            text_dropped=torch.zeros_like(inputs.timesteps, dtype=torch.bool),
        )
