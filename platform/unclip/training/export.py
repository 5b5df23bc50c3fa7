"""Weights out of a checkpoint: no DeepSpeed, no process group, one parameter in memory at a time where wanted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch

from unclip.training.checkpoint import Checkpoint, FragmentReader

WeightKind = Literal["ema", "fp32"]
"""The moving average of the weights, or the weights of the last step."""


def export_weights(checkpoint: Checkpoint, kind: WeightKind = "ema") -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter by name, float32 in its own shape on the CPU, put together from the ranks' slices."""
    with FragmentReader(checkpoint) as reader:
        for name, shape in checkpoint.shapes.items():
            yield name, reader.read(name, kind, 0, math.prod(shape)).view(shape)


def full_state_dict(checkpoint: Checkpoint, kind: WeightKind = "ema") -> dict[str, torch.Tensor]:
    """What `load_state_dict` of the trained module takes: all parameters, float32, and the persistent buffers."""
    weights = dict(export_weights(checkpoint, kind))
    with FragmentReader(checkpoint) as reader:
        return weights | {name: reader.read_buffer(name) for name in checkpoint.buffers}
