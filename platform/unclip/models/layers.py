"""Parts that several models share: time embedding, group normalisation, attention heads, transformer blocks.

Shapes: B batch, L sequence, C or W width, H heads. Parameters may be float32 or bfloat16; PyTorch's normalisation and
softmax kernels accumulate in float32 either way, which is what GLIDE's and ADM's `GroupNorm32` is for.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

M = TypeVar("M", bound=nn.Module)


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
    # PyTorch's fused backward pass in bfloat16 on CPUs takes 3 to 8 times as long as these matrix products.
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1) @ value


def run_block(block: nn.Module, *inputs: torch.Tensor | None, recompute: bool) -> torch.Tensor:
    """Calls `block`; with `recompute` its activations are not kept but computed again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        result: torch.Tensor = checkpoint(block, *inputs, use_reentrant=False)
        return result
    output: torch.Tensor = block(*inputs)
    return output


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
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """x: (B, L, W); attention_mask: bool, broadcast to (B, H, L, L), True = may look; None = all may."""
        query, key, value = split_heads(self.qkv(self.attention_norm(x)), self.heads, 3)
        attended = attention(query, key, value, attention_mask)
        x = x + self.attention_out(merge_heads(attended))
        result: torch.Tensor = x + self.mlp_out(functional.gelu(self.mlp_in(self.mlp_norm(x))))
        return result


class Transformer(nn.Module):
    """`depth` blocks and a last LayerNorm: (B, L, W) -> (B, L, W).

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

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.blocks:
            x = run_block(block, x, attention_mask, recompute=self.activation_checkpointing)
        result: torch.Tensor = self.final_norm(x)
        return result
