"""What a step of any side is given, and classifier-free guidance as every side does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from benchmarks.shapes import GUIDANCE_SCALE, PriorShape, Shape
from torch import nn
from torch.nn import functional

Denoise = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Inputs:
    """One batch, drawn from a fixed seed.

    x_t: (B, C, H, W), or (B, D) for the prior; an upsampler's holds the low-resolution picture in its last channels.
    target: what the model output is compared with.
    embedding: (B, 4 * channels) added to the decoder's time embedding, or the prior's (B, D) text embedding.
    states: (B, L, W), the decoder's context or the prior's text states; empty for upsamplers, as is `embedding`.
    tokens: (B, L) for a prior that embeds tokens itself.
    """

    x_t: torch.Tensor
    timesteps: torch.Tensor
    target: torch.Tensor
    embedding: torch.Tensor
    states: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def draw(cls, shape: Shape, step: str, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=device)

        def integers(high: int, *size: int) -> torch.Tensor:
            return torch.randint(high, size, generator=generator, device=device)

        count, pixels = shape.batch(step)
        if isinstance(shape, PriorShape):
            width, length = shape.width, shape.context_length
            return cls(
                x_t=normal(count, width),
                timesteps=integers(1000, count),
                target=normal(count, width),
                embedding=functional.normalize(normal(count, width)),
                states=normal(count, length, width),
                tokens=integers(width, count, length),
            )
        length, width = shape.context or (0, 0)
        return cls(
            x_t=normal(count, shape.in_channels, pixels, pixels),
            timesteps=integers(1000, count),
            target=normal(count, shape.out_channels, pixels, pixels),
            embedding=normal(count, 4 * shape.channels if length else 0),
            states=normal(count, length, width),
            tokens=integers(1, count, length),
        )


class Side(Protocol):
    """One network of one row."""

    @property
    def module(self) -> nn.Module: ...

    def predict(self, inputs: Inputs) -> torch.Tensor:
        """The model output of a training step."""
        ...

    def request(self, inputs: Inputs) -> Denoise:
        """Begins a request: computes what its steps share, and returns the step, guided for decoder and prior."""
        ...


def twice(x: torch.Tensor) -> torch.Tensor:
    """The doubled batch of classifier-free guidance."""
    return torch.cat([x, x])


def guided(doubled: torch.Tensor) -> torch.Tensor:
    """Output of the doubled batch, unconditional half first -> guided output."""
    unconditional, conditional = doubled.chunk(2)
    return unconditional + GUIDANCE_SCALE * (conditional - unconditional)
