"""Networks compiled for few numbers of rows."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from unclip.diffusion.guidance import Denoise

_FORMS = 256
"""Compiled forms of one function: all stages share their U-Net's code, and each has some for every number of rows."""


def padded_sizes(most: int) -> list[int]:
    """1, 2, 4, ... and `most`: numbers of rows of which every smaller one fills more than half of the next."""
    return [*(2**power for power in range((most - 1).bit_length())), most]


def as_it_is(rows: int) -> int:
    """No padding: what is not compiled takes any number of rows, and more of them take longer."""
    return rows


def padding_to(sizes: list[int]) -> Callable[[int], int]:
    """The least of the rising `sizes` that so many rows fit into."""
    return lambda rows: sizes[bisect.bisect_left(sizes, rows)]


def compiled(network: nn.Module) -> Denoise[Any]:
    """`network` compiled anew for each number of rows that it sees; `network` itself stays as it is."""
    config = cast("Any", torch._dynamo.config)
    config.recompile_limit = max(config.recompile_limit, _FORMS)
    return cast("Denoise[Any]", torch.compile(network, dynamic=False))
