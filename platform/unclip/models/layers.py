"""Parts that several models share: time embedding, group normalisation, attention heads, transformer blocks.

Shapes: B batch, L sequence, C or W width, H heads. Parameters may be float32 or bfloat16; PyTorch's normalisation and
softmax kernels accumulate in float32 either way, which is what GLIDE's and ADM's `GroupNorm32` is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, Protocol, TypeVar

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from unclip.models.fused import GeluLinear, recomputing_attention

M = TypeVar("M", bound=nn.Module)

Depth = Annotated[int, Field(ge=1, le=512)]
"""Blocks of a network. Bounded, as a network is laid out before foreign weights are compared with it."""

Extend = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""extend(key, value) -> the keys and values that a block's queries look at."""


def timestep_embedding(timesteps: torch.Tensor, width: int) -> torch.Tensor:
    """Sinusoids of the timesteps, cosines first (ADM, GLIDE): (B,) -> (B, width) float32; `width` is even."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, dtype=torch.float32, device=timesteps.device))
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepMLP(nn.Module):
    """Timesteps (B,) -> (B, out_width): sinusoids of `width`, then two linear layers with SiLU between."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(nn.Linear(width, out_width), nn.SiLU(), nn.Linear(out_width, out_width))

    def forward(self, timesteps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        result: torch.Tensor = self.layers(timestep_embedding(timesteps, self.width).to(dtype))
        return result


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 32 groups (ADM), or fewer in narrow layers: groups divide `channels` and hold at least 4 of them.

    A group of one channel would wipe out the mean of each channel, which is where small pictures keep their colour.
    """
    groups = math.gcd(32, channels)
    while groups > 1 and channels // groups < 4:
        groups //= 2
    return nn.GroupNorm(groups, channels, eps=1e-5)


def zero_init(module: M) -> M:
    """Sets every parameter of `module` to zero, so that a residual branch starts as nothing, and returns it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def split_heads(x: torch.Tensor, heads: int, parts: int) -> tuple[torch.Tensor, ...]:
    """(B, L, H * parts * D), packed head by head as in GLIDE -> `parts` tensors of (B, H, L, D)."""
    batch, length, _ = x.shape
    return x.view(batch, length, heads, -1).transpose(1, 2).chunk(parts, dim=-1)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """(B, H, L, D) -> (B, L, H * D)."""
    return x.transpose(1, 2).flatten(2)


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(q k^T D^-1/2) v for (B, H, L, D) queries and (B, H, S, D) keys and values.

    `mask` is bool, broadcasts to (B, H, L, S), and is True where a query may look.
    """
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    # With gradients, PyTorch's own takes 1.4 to 1.5 times as long up to 256 positions, and a tenth less at 1024.
    return recomputing_attention(query, key, value, mask)


def run_block(block: nn.Module, *inputs: torch.Tensor | None, recompute: bool) -> torch.Tensor:
    """Calls `block`; with `recompute` its activations are not kept but computed again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        result: torch.Tensor = checkpoint(block, *inputs, use_reentrant=False)
        return result
    output: torch.Tensor = block(*inputs)
    return output


def causal_mask(visible: torch.Tensor, queries: int) -> torch.Tensor:
    """(B, S) bool, what may be seen at all -> (B, 1, queries, S): what each of the last `queries` positions may see.

    That is itself and whatever is visible before it; a hidden position too sees itself, as a query that may look nowhere
    would be NaN.
    """
    positions = torch.arange(visible.shape[1], device=visible.device)
    mine = positions[visible.shape[1] - queries :, None]
    return (visible[:, None, None, :] & (positions < mine)) | (positions == mine)


class Earlier(Protocol):
    """Keys and values of the positions before those that a causal transformer is given."""

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, H, S, D) of block `layer` at every position so far, those of the new ones at the end."""
        ...


class Prefix:
    """A start of the sequence that stays: what comes behind it is never added, so it serves any number of steps.

    Args:
        keys_values: (B, depth, 2, H, S, D), as `KeyValueCache` collects them.
    """

    def __init__(self, keys_values: torch.Tensor) -> None:
        self._keys_values = keys_values

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = self._keys_values[:, layer]
        return torch.cat([before[:, 0], key], dim=2), torch.cat([before[:, 1], value], dim=2)


class KeyValueCache:
    """A sequence that grows: remembers the keys and values of every position that passes, up to `capacity` of them.

    Written in place, so for use without gradients only.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._layers: list[torch.Tensor] = []  # (B, 2, H, capacity, D) each
        self._filled: list[int] = []

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch, heads, length, width = key.shape
        if layer == len(self._layers):
            self._layers.append(key.new_empty(batch, 2, heads, self.capacity, width))
            self._filled.append(0)
        start, stop = self._filled[layer], self._filled[layer] + length
        if stop > self.capacity:
            raise ValueError(f"position {stop} of a sequence with room for {self.capacity}")
        stored = self._layers[layer]
        stored[:, 0, :, start:stop], stored[:, 1, :, start:stop] = key, value
        self._filled[layer] = stop
        return stored[:, 0, :, :stop], stored[:, 1, :, :stop]

    def keys_values(self) -> torch.Tensor:
        """(B, depth, 2, H, S, D) of the S positions seen so far."""
        return torch.stack([layer[..., : self._filled[0], :] for layer in self._layers], dim=1)


class TransformerBlock(nn.Module):
    """Pre-normalised self-attention and a four times wider GELU network, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = GeluLinear(4 * width, width)

    def forward(
        self, x: torch.Tensor, attention_mask: torch.Tensor | None, extend: Extend | None = None
    ) -> torch.Tensor:
        """The states (B, Q, W) of the last Q positions of `x` (B, L, W); the others are only looked at.

        Args:
            attention_mask: bool, (B or 1, 1, Q, S), True = may look; None = all may, and Q is L.
            extend: makes the S positions that are looked at of those of `x`; None = they are those of `x`.
        """
        query, key, value = split_heads(self.qkv(self.attention_norm(x)), self.heads, 3)
        if extend is not None:
            key, value = extend(key, value)
        if attention_mask is not None:
            queries = attention_mask.shape[-2]
            x, query = x[:, -queries:], query[:, :, -queries:]
        attended = attention(query, key, value, attention_mask)
        x = x + self.attention_out(merge_heads(attended))
        result: torch.Tensor = x + self.mlp_out(self.mlp_in(self.mlp_norm(x)))
        return result


class Transformer(nn.Module):
    """`depth` blocks and a last LayerNorm: (B, L, W) -> (B, L, W), or fewer states where fewer are asked for.

    Weights start as in CLIP (Radford et al. 2021, and its published code): standard deviation W^-1/2, on the paths into
    the residual stream (2 W depth)^-1/2, so that its variance does not grow with depth. GLIDE does not say.
    """

    def __init__(self, *, width: int, depth: int, heads: int, activation_checkpointing: bool) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.final_norm = nn.LayerNorm(width)
        for block in self.blocks:
            assert isinstance(block, TransformerBlock)
            for layer, std in (
                (block.qkv, width**-0.5),
                (block.attention_out, (2 * width * depth) ** -0.5),
                (block.mlp_in, (2 * width) ** -0.5),
                (block.mlp_out, (2 * width * depth) ** -0.5),
            ):
                nn.init.normal_(layer.weight, std=std)
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        earlier: Earlier | None = None,
        outputs: int | None = None,
    ) -> torch.Tensor:
        """The states of `x` (B, L, W).

        Args:
            attention_mask: bool, (B or 1, 1, L, S), True = may look; None = all may.
            earlier: what `x` follows; None = it is the whole sequence, and S is L.
            outputs: how many of the last states are wanted, with a mask only; None = all. The last block leaves the
                others out.
        """
        masks = [attention_mask] * len(self.blocks)
        if outputs is not None:
            assert attention_mask is not None
            masks[-1] = attention_mask[..., -outputs:, :]
        for layer, (block, mask) in enumerate(zip(self.blocks, masks, strict=True)):
            if earlier is None:
                x = run_block(block, x, mask, recompute=self.activation_checkpointing)
            else:
                x = block(x, mask, partial(earlier.extend, layer))
        result: torch.Tensor = self.final_norm(x)
        return result
