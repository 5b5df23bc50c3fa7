"""The network of a judge: a small residual network (He et al. 2016) with a head for each attribute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional


def as_ink(pictures: npt.NDArray[Any] | torch.Tensor) -> torch.Tensor:
    """uint8 (B, S, S, 3) -> float32 (B, 3, S, S) in [0, 1], white = 0: so what is moved in from outside is paper."""
    return 1 - torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 255


class JudgeNetwork(nn.Module):
    """Pictures to the classes of several attributes. Heads see the means of every stage: early ones tell colours, whatever is
    drawn in them, the last one what it is.

    Args:
        num_classes: of each attribute.
        width: channels of the first layer.
    """

    def __init__(self, num_classes: Sequence[int], width: int) -> None:
        super().__init__()
        self.num_classes = list(num_classes)
        stem = nn.Sequential(nn.Conv2d(3, width, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        blocks = [_HalvingBlock(width * factor, width * factor * 2) for factor in (1, 2, 4)]
        self.stages = nn.ModuleList([stem, *blocks])
        self.heads = nn.Linear(width * (1 + 2 + 4 + 8), sum(num_classes))

    def forward(self, ink: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, 3, S, S) of `as_ink`, S a multiple of 16 -> logits (B, classes) of each attribute."""
        h, means = ink.contiguous(memory_format=torch.channels_last), []
        for stage in self.stages:
            h = stage(h)
            means.append(h.mean(dim=(2, 3)))
        return self.heads(torch.cat(means, dim=1)).split(self.num_classes, dim=1)


class _HalvingBlock(nn.Module):
    """(B, C, 2S, 2S) -> (B, C', S, S)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.skip = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(in_channels, out_channels, 1, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.residual(x) + self.skip(x))
