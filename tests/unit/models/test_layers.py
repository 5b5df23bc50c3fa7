from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from unclip.models.layers import (
    KeyValueCache,
    Prefix,
    Transformer,
    attention,
    causal_mask,
    group_norm,
    merge_heads,
    split_heads,
    timestep_embedding,
)


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


def test_causal_mask_hides_what_comes_later_and_what_is_hidden() -> None:
    mask = causal_mask(torch.tensor([[True, False, True, True]]), 3)
    expected = [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]  # the hidden position 1 sees itself, nobody else does
    assert mask.shape == (1, 1, 3, 4)
    assert mask[0, 0].int().tolist() == expected


@pytest.fixture
def transformer(randomized: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return randomized(Transformer(width=16, depth=3, heads=2, activation_checkpointing=False))


VISIBLE = (torch.rand(2, 7, generator=torch.Generator().manual_seed(0)) < 0.7) | (torch.arange(7) > 3)


@pytest.mark.parametrize("parts", [[7], [4, 3], [1] * 7, [2, 1, 4]])
def test_a_sequence_in_parts_has_the_states_of_the_whole(transformer: nn.Module, parts: list[int]) -> None:
    x = torch.randn(2, 7, 16)
    cache, states, done = KeyValueCache(7), [], 0
    with torch.no_grad():
        for part in parts:
            mask = causal_mask(VISIBLE[:, : done + part], part)
            states.append(transformer(x[:, done : done + part], mask, earlier=cache))
            done += part
        whole = transformer(x, causal_mask(VISIBLE, 7))
    torch.testing.assert_close(torch.cat(states, dim=1), whole, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="position 8 of a sequence with room for 7"):
        transformer(x[:, :1], None, earlier=cache)


def test_a_prefix_serves_many_continuations(transformer: nn.Module) -> None:
    """Each continuation sees the prefix alone, not the continuations before it, and passes gradients."""
    start, cache = torch.randn(2, 4, 16), KeyValueCache(4)
    with torch.no_grad():
        transformer(start, causal_mask(VISIBLE[:, :4], 4), earlier=cache)
    prefix = Prefix(cache.keys_values())
    assert cache.keys_values().shape == (2, 3, 2, 2, 4, 8)
    for _ in range(2):
        end = torch.randn(2, 3, 16, requires_grad=True)
        states = transformer(end, causal_mask(VISIBLE, 3), earlier=prefix)
        whole = transformer(torch.cat([start, end], dim=1), causal_mask(VISIBLE, 7))[:, 4:]
        torch.testing.assert_close(states, whole, rtol=1e-5, atol=1e-5)
        (gradient,) = torch.autograd.grad(states.sum(), end)
        (expected,) = torch.autograd.grad(whole.sum(), end)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("outputs", [1, 3, 7])
def test_the_last_states_alone_are_those_of_the_whole(transformer: nn.Module, outputs: int) -> None:
    """Though the last block then computes no others, forwards and backwards."""
    x, lengths, results = torch.randn(2, 7, 16), [], []
    transformer.blocks[-1].mlp_in.register_forward_hook(
        lambda _module, _inputs, output: lengths.append(output.shape[1])
    )
    for wanted in (outputs, None):
        given = x.clone().requires_grad_()
        states = transformer(given, causal_mask(VISIBLE, 7), outputs=wanted)[:, -outputs:]
        results.append((states, *torch.autograd.grad(states.square().sum(), given)))
    assert lengths == [outputs, 7]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
