from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from unclip.models.layers import attention, group_norm, merge_heads, split_heads, timestep_embedding


def test_timestep_embedding_is_cosines_then_sines() -> None:
    embedding = timestep_embedding(torch.tensor([0, 7]), 6)
    frequencies = [1.0, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3)]
    expected = [math.cos(7 * f) for f in frequencies] + [math.sin(7 * f) for f in frequencies]
    torch.testing.assert_close(embedding[0], torch.tensor([1.0, 1, 1, 0, 0, 0]))
    torch.testing.assert_close(embedding[1], torch.tensor(expected))


@pytest.mark.parametrize(
    ("channels", "groups"), [(192, 32), (320, 32), (512, 32), (960, 32), (128, 32), (64, 16), (48, 8), (32, 8), (6, 1)]
)
def test_groups_divide_and_hold_four_channels(channels: int, groups: int) -> None:
    assert group_norm(channels).num_groups == groups


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_group_norm_of_bfloat16_is_computed_in_float32(memory_format: torch.memory_format) -> None:
    """Large mean, small spread: statistics in bfloat16 would be far off; only the result may be rounded."""
    norm = group_norm(128).bfloat16()
    x = (torch.randn(2, 128, 16, 16) + 50).bfloat16().contiguous(memory_format=memory_format)
    exact = nn.functional.group_norm(x.double(), norm.num_groups, eps=norm.eps)
    torch.testing.assert_close(norm(x).double(), exact, rtol=2**-8, atol=1e-3)


def test_heads_are_packed_one_after_the_other() -> None:
    x = torch.arange(2 * 3 * 12.0).view(2, 3, 12)  # two heads of q, k, v, each two wide
    query, _, value = split_heads(x, 2, 3)
    torch.testing.assert_close(query[0, 0], x[0, :, 0:2])
    torch.testing.assert_close(query[0, 1], x[0, :, 6:8])
    torch.testing.assert_close(value[0, 1], x[0, :, 10:12])
    torch.testing.assert_close(merge_heads(query)[..., 2:], x[..., 6:8])


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_bfloat16_on_cpus_equals_pytorchs(masked: bool) -> None:
    """There it is our own: forward and gradients as PyTorch's in float64, to bfloat16's rounding."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, length, 16).bfloat16().requires_grad_() for length in (5, 7, 7)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    mask = (torch.rand(2, 1, 5, 7) < 0.7) if masked else None
    result = attention(*inputs, mask)
    expected = nn.functional.scaled_dot_product_attention(*exact, attn_mask=mask)
    upstream = torch.randn_like(expected)
    result.backward(upstream.bfloat16())
    expected.backward(upstream)
    torch.testing.assert_close(result.double(), expected, rtol=2**-6, atol=2**-6)
    for ours, theirs in zip(inputs, exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=2**-5, atol=2**-5)
