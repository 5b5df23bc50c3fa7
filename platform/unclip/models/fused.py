"""Activations that are not kept for the gradient: each is computed again from its input where the product behind it needs it.

An activation f takes hundreds of times less work than the product P behind it, but as much memory. Here P f(y) keeps y
alone. With dP the gradient of its output, that of y is f'(y) P^T dP, and that of the weight of P is made from f(y) anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

Resample = Literal["no", "down", "up"]


def resampled(x: torch.Tensor, resample: Resample) -> torch.Tensor:
    """(B, C, H, W) with height and width halved (average) or doubled (nearest)."""
    if resample == "down":
        return functional.avg_pool2d(x, 2)
    if resample == "up":
        if x.is_cpu and x.is_contiguous():
            doubled: torch.Tensor = _Doubled.apply(x)
            return doubled
        return functional.interpolate(x, scale_factor=2, mode="nearest")
    return x


def _repeated(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)


class _Doubled(torch.autograd.Function):
    """Nearest doubling: on CPUs PyTorch's own takes ten times as long forwards, but is the faster one backwards."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.shape = x.shape
        return _repeated(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _doubled_backward(gradient, ctx.shape)


def _doubled_backward(gradient: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    result: torch.Tensor = torch.ops.aten.upsample_nearest2d_backward(gradient, gradient.shape[2:], shape, 2.0, 2.0)
    return result


def _resampled_gradient(gradient: torch.Tensor, resample: Resample) -> torch.Tensor:
    """The gradient of x, given that of `resampled(x, resample)`."""
    if resample == "down":
        return _repeated(gradient * 0.25)
    if resample == "up":
        *batch, height, width = gradient.shape
        return _doubled_backward(gradient, (*batch, height // 2, width // 2))
    return gradient


class _SiluConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, resample: Resample
    ) -> torch.Tensor:
        if torch.is_autocast_enabled(y.device.type):  # once for both passes
            weight = weight.to(torch.get_autocast_dtype(y.device.type))
        ctx.save_for_backward(y, weight)
        ctx.resample = resample
        return functional.conv2d(resampled(functional.silu(y), resample), weight, bias, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, weight = ctx.saved_tensors
        active = resampled(functional.silu(y), ctx.resample).to(weight.dtype)
        wanted = list(ctx.needs_input_grad[:3])
        sizes, pairs = [weight.shape[0]], ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
        dy, dweight, dbias = torch.ops.aten.convolution_backward(gradient, active, weight, sizes, *pairs, wanted)
        if dy is not None:
            dy = _resampled_gradient(dy.to(y.dtype), ctx.resample)
            torch.ops.aten.silu_backward.grad_input(dy, y, grad_input=dy)  # memory anew costs more than the arithmetic
        return dy, dweight, dbias, None


class SiluConv2d(nn.Conv2d):
    """A 3x3 convolution of SiLU(y), padded by one zero; with `dropout`, that share of SiLU(y) is dropped in training."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        self.dropout = dropout

    def forward(self, y: torch.Tensor, resample: Resample = "no") -> torch.Tensor:
        """y: (B, C, H, W), lost where no gradients are wanted; what comes out of SiLU is resampled before the convolution."""
        if not torch.is_grad_enabled():
            return super().forward(resampled(functional.silu(y, inplace=True), resample))
        if self.training and self.dropout:  # which elements were dropped would have to be kept anyway
            active = resampled(functional.silu(y), resample)
            return super().forward(functional.dropout(active, self.dropout))
        result: torch.Tensor = _SiluConv.apply(y, self.weight, self.bias, resample)
        return result


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(y, weight)
        return functional.linear(functional.gelu(y), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, weight = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        dy = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dy = torch.ops.aten.gelu_backward((gradient @ weight.to(gradient.dtype)).to(y.dtype), y)
        if ctx.needs_input_grad[1]:
            dweight = flat.t() @ functional.gelu(y).to(gradient.dtype).view(-1, y.shape[-1])
        if ctx.needs_input_grad[2]:
            dbias = flat.sum(dim=0)
        return dy, dweight, dbias


class GeluLinear(nn.Linear):
    """A linear layer over GELU(y)."""

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return super().forward(functional.gelu(y))
        result: torch.Tensor = _GeluLinear.apply(y, self.weight, self.bias)
        return result


def _weights(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """softmax(q k^T D^-1/2): (B, H, L, D) and (B, H, S, D) -> (B, H, L, S)."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return (scores if mask is None else scores.masked_fill_(~mask, -math.inf)).softmax(dim=-1)


_WEIGHTS_AT_ONCE = 1 << 22
"""Weights that are in memory together, 8 MiB of them, unless one sample has more: samples of few positions go together."""

_Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


def _parts(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> list[_Part]:
    """As many samples at a time as `_WEIGHTS_AT_ONCE` allows."""
    _, heads, length, _ = query.shape
    rows = max(1, _WEIGHTS_AT_ONCE // (heads * length * key.shape[2]))
    tensors = [tensor.split(rows) for tensor in (query, key, value)]
    masks = [mask] * len(tensors[0]) if mask is None or mask.shape[0] == 1 else list(mask.split(rows))
    return list(zip(*tensors, masks, strict=True))


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class _Attention(torch.autograd.Function):
    """With P the weights and do the gradient of P v: dv = P^T do, dP = do v^T, and of the scores P (dP - sum(P dP))."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, mask)
        return _joined([_weights(q, k, m) @ v for q, k, v, m in _parts(query, key, value, mask)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        parts = _parts(*ctx.saved_tensors)
        scale = ctx.saved_tensors[0].shape[-1] ** -0.5
        gradients: list[tuple[torch.Tensor, ...]] = []
        for (query, key, value, mask), upstream in zip(parts, gradient.split(len(parts[0][0])), strict=True):
            weights = _weights(query, key, mask)
            dvalue = weights.transpose(-2, -1) @ upstream
            dweights = upstream @ value.transpose(-2, -1)
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            gradients.append((dscores @ key * scale, dscores.transpose(-2, -1) @ query * scale, dvalue))
        return *(_joined(list(each)) for each in zip(*gradients, strict=True)), None


def recomputing_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """As `unclip.models.layers.attention`, by matrix products, few samples at a time; keeps no weights for the gradient."""
    result: torch.Tensor = _Attention.apply(query, key, value, mask)
    return result
