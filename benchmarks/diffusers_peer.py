"""diffusers' modules of the same shape: its unCLIP decoder, its unCLIP upsampler and its prior.

Their pipelines call them once a step with everything, so nothing is computed once a request here. Inputs are cast to the
module's float type, as they demand.
"""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.inputs import Denoise, Inputs, Side, guided, twice
from benchmarks.shapes import PriorShape, Shape, UNetShape
from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel

PACKAGE = "diffusers"


def build(shape: Shape, _parameters: int = 0) -> Side:
    """The module of the same shape, which has our parameter count without being fitted to it."""
    if isinstance(shape, PriorShape):
        return Prior(shape)
    return Upsampler(shape) if shape.context is None else Decoder(shape)


def _widths(shape: UNetShape) -> tuple[int, ...]:
    return tuple(shape.channels * mult for mult in shape.channel_mult)


class Upsampler:
    """As in the unCLIP pipeline's `super_res_first`."""

    def __init__(self, shape: UNetShape) -> None:
        levels = len(shape.channel_mult)
        self.module: Any = UNet2DModel(
            in_channels=shape.in_channels,
            out_channels=shape.out_channels,
            block_out_channels=_widths(shape),
            layers_per_block=shape.depth,
            down_block_types=("ResnetDownsampleBlock2D",) * levels,
            up_block_types=("ResnetUpsampleBlock2D",) * levels,
            add_attention=False,
            norm_num_groups=shape.norm_groups,
        )

    def predict(self, inputs: Inputs) -> torch.Tensor:
        return self.module(inputs.x_t.to(self.module.dtype), inputs.timesteps, return_dict=False)[0]

    def request(self, inputs: Inputs) -> Denoise:
        return lambda: self.predict(inputs)


class Decoder:
    """As in the unCLIP pipeline's `decoder`: the embedding comes as class labels, the context as encoder states."""

    def __init__(self, shape: UNetShape) -> None:
        assert shape.context is not None
        levels = range(len(shape.channel_mult))
        attends = [level in shape.attended_levels for level in levels]
        down = ["SimpleCrossAttnDownBlock2D" if attend else "ResnetDownsampleBlock2D" for attend in attends]
        up = ["SimpleCrossAttnUpBlock2D" if attend else "ResnetUpsampleBlock2D" for attend in reversed(attends)]
        self.module: Any = UNet2DConditionModel(
            in_channels=shape.in_channels,
            out_channels=shape.out_channels,
            block_out_channels=_widths(shape),
            layers_per_block=shape.depth,
            down_block_types=tuple(down),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=tuple(up),
            cross_attention_dim=shape.context[1],
            attention_head_dim=shape.head_channels,
            resnet_time_scale_shift="scale_shift",
            class_embed_type="identity",
            norm_num_groups=shape.norm_groups,
        )

    def predict(self, inputs: Inputs) -> torch.Tensor:
        return self._output(inputs.x_t, inputs.timesteps, inputs.states, inputs.embedding)

    def request(self, inputs: Inputs) -> Denoise:
        states, embedding = twice(inputs.states), twice(inputs.embedding)
        return lambda: guided(self._output(twice(inputs.x_t), twice(inputs.timesteps), states, embedding))

    def _output(
        self, x_t: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor, embedding: torch.Tensor
    ) -> torch.Tensor:
        dtype = self.module.dtype
        return self.module(
            x_t.to(dtype), timesteps, states.to(dtype), class_labels=embedding.to(dtype), return_dict=False
        )[0]


class Prior:
    """As in the unCLIP pipeline's `prior`, with the mask of its captions."""

    def __init__(self, shape: PriorShape) -> None:
        self.module: Any = PriorTransformer(
            num_attention_heads=shape.heads,
            attention_head_dim=shape.width // shape.heads,
            num_layers=shape.depth,
            embedding_dim=shape.width,
            num_embeddings=shape.context_length,
        )

    def predict(self, inputs: Inputs) -> torch.Tensor:
        return self._output(inputs.x_t, inputs.timesteps, inputs.embedding, inputs.states)

    def request(self, inputs: Inputs) -> Denoise:
        embedding, states = twice(inputs.embedding), twice(inputs.states)
        return lambda: guided(self._output(twice(inputs.x_t), twice(inputs.timesteps), embedding, states))

    def _output(
        self, x_t: torch.Tensor, timesteps: torch.Tensor, embedding: torch.Tensor, states: torch.Tensor
    ) -> torch.Tensor:
        dtype = self.module.dtype
        mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        return self.module(
            x_t.to(dtype), timesteps, embedding.to(dtype), states.to(dtype), attention_mask=mask, return_dict=False
        )[0]
