from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from unclip.models.unet import ResidualBlock, SpatialAttention, UNet, UNetConfig

SMALL: dict[str, Any] = {"channels": 16, "channel_mult": (1, 2), "depth": 1, "head_channels": 8, "image_size": 16}


def small(**changes: Any) -> UNetConfig:
    return UNetConfig(**(SMALL | changes))


def pictures(rows: int = 2, channels: int = 3, size: int = 16) -> torch.Tensor:
    return torch.randn(rows, channels, size, size, generator=torch.Generator().manual_seed(3))


def attentions(model: nn.Module) -> int:
    return sum(isinstance(module, SpatialAttention) for module in model.modules())


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("attention_resolutions", [(), (8,)])
def test_output_is_zero_at_first(patch_size: int, attention_resolutions: tuple[int, ...]) -> None:
    model = small(patch_size=patch_size, attention_resolutions=attention_resolutions, out_channels=6).build()
    output = model(pictures(), torch.tensor([0, 999]))
    assert output.shape == (2, 6, 16, 16)
    assert not output.any()


def test_residual_branches_are_nothing_at_first() -> None:
    """Every block passes its input on, so that the head sees the stem's output."""
    block = ResidualBlock(16, 16, config=small())
    attention = SpatialAttention(16, head_channels=8, context_dim=None)
    x = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(block(x, torch.randn(2, 64)), x)
    torch.testing.assert_close(attention(x, None, None), x)


@pytest.mark.parametrize(
    ("resolutions", "patch_size", "expected"),
    # level 0 has 1 + 2 attentions, level 1 as many, the middle one
    [((), 1, 0), ((8,), 1, 4), ((16, 8), 1, 7), ((8,), 2, 4), ((4,), 2, 4)],
)
def test_attention_is_where_it_is_asked_for(resolutions: tuple[int, ...], patch_size: int, expected: int) -> None:
    assert attentions(small(attention_resolutions=resolutions, patch_size=patch_size).build()) == expected


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("scale_shift_norm", [True, False])
@pytest.mark.parametrize("resample", ["no", "down", "up"])
def test_residual_block_is_adms(
    randomized: Callable[[nn.Module], nn.Module],
    scale_shift_norm: bool,
    resample: str,
    memory_format: torch.memory_format,
) -> None:
    block = randomized(ResidualBlock(16, 32, config=small(scale_shift_norm=scale_shift_norm), resample=resample))
    block = block.to(memory_format=memory_format)
    x, embedding = torch.randn(2, 16, 8, 8).contiguous(memory_format=memory_format), torch.randn(2, 64)

    def norm(y: torch.Tensor, layer: nn.GroupNorm) -> torch.Tensor:
        groups = y.reshape(y.shape[0], layer.num_groups, -1)
        mean, variance = groups.mean(dim=2, keepdim=True), groups.var(dim=2, keepdim=True, unbiased=False)
        y = ((groups - mean) / (variance + 1e-5).sqrt()).reshape(y.shape)
        return y * layer.weight[:, None, None] + layer.bias[:, None, None]

    def change(y: torch.Tensor) -> torch.Tensor:
        if resample == "down":
            return (y[:, :, ::2, ::2] + y[:, :, 1::2, ::2] + y[:, :, ::2, 1::2] + y[:, :, 1::2, 1::2]) / 4
        return y.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3) if resample == "up" else y

    def swish(y: torch.Tensor) -> torch.Tensor:
        return y * torch.sigmoid(y)

    def conditioned(y: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        if scale_shift_norm:
            return norm(y, block.norm_out) * (1 + time[:, :32]) + time[:, 32:]
        return norm(y + time, block.norm_out)

    def convolved(y: torch.Tensor, layer: nn.Conv2d) -> torch.Tensor:
        return nn.functional.conv2d(y, layer.weight, layer.bias, padding=1)

    h = convolved(change(swish(norm(x, block.norm_in))), block.conv_in)
    h = conditioned(h, block.embedding(embedding)[..., None, None])
    expected = block.skip(change(x)) + convolved(swish(h), block.conv_out)
    torch.testing.assert_close(block(x, embedding), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_attention_is_glides(randomized: Callable[[nn.Module], nn.Module], memory_format: torch.memory_format) -> None:
    """One softmax over context and positions; masked context has no weight; q and k are scaled by d^-1/4 each."""
    attention = randomized(SpatialAttention(16, head_channels=8, context_dim=12))
    x = torch.randn(2, 16, 4, 4).contiguous(memory_format=memory_format)
    context, mask = torch.randn(2, 5, 12), torch.tensor([[True] * 5, [True, False, True, False, False]])
    scale = 8**-0.25
    expected = torch.empty(2, 16, 16)
    for row in range(2):
        own = attention.qkv(attention.norm(x)[row].reshape(16, 16).T)
        other = attention.context_kv(context[row])
        for head in range(2):
            query, key, value = own[:, 24 * head : 24 * (head + 1)].split(8, dim=1)
            context_key, context_value = other[:, 16 * head : 16 * (head + 1)].split(8, dim=1)
            keys = torch.cat([context_key[mask[row]], key])
            weights = ((query * scale) @ (keys * scale).T).exp()
            weights = weights / weights.sum(dim=1, keepdim=True)
            values = torch.cat([context_value[mask[row]], value])
            expected[row, :, 8 * head : 8 * (head + 1)] = weights @ values
    result = x + attention.out(expected).transpose(1, 2).reshape(2, 16, 4, 4)
    keys_values = attention.keys_values(context)
    torch.testing.assert_close(attention(x, keys_values, mask), result, rtol=1e-4, atol=1e-4)


def test_context_and_embedding_matter(randomized: Callable[[nn.Module], nn.Module]) -> None:
    model = randomized(small(attention_resolutions=(8,)).build(context_dim=12))
    x, timesteps = pictures(), torch.tensor([1, 2])
    embedding, context = torch.randn(2, 64), torch.randn(2, 5, 12)
    mask = torch.tensor([[True, True, False, False, False]] * 2)
    output = model(x, timesteps, model.prepare(embedding, context, mask))
    hidden = torch.cat([context[:, :2], torch.randn(2, 3, 12)], dim=1)
    torch.testing.assert_close(model(x, timesteps, model.prepare(embedding, hidden, mask)), output)
    for changed in (
        model(x, timesteps, model.prepare(embedding, hidden)),
        model(x, timesteps, model.prepare(embedding, -context, mask)),
        model(x, timesteps, model.prepare(-embedding, context, mask)),
        model(x, timesteps + 1, model.prepare(embedding, context, mask)),
        model(x + 0.1, timesteps, model.prepare(embedding, context, mask)),
    ):
        assert (changed - output).abs().amax() > 1e-3


def test_patches_are_folded_at_the_stem_and_unfolded_at_the_head() -> None:
    """With a stem and a head that copy, and blocks that are nothing, a pixel comes out where it went in."""
    config = UNetConfig(channels=12, channel_mult=(1,), depth=1, image_size=8, patch_size=2)
    model = config.build()
    model.head_norm, x = nn.Identity(), pictures(size=8).abs() + 20  # SiLU leaves such numbers as they are
    with torch.no_grad():
        for conv in (model.stem, model.head):
            conv.bias.zero_()
            conv.weight.zero_()
            conv.weight[torch.arange(12), torch.arange(12), 1, 1] = 1
        for layer in model.up:  # its skip connection adds current and kept activations: take their mean
            layer.residual.skip.weight.copy_((torch.eye(12).repeat(1, 2) / 2)[:, :, None, None])
            layer.residual.skip.bias.zero_()
    torch.testing.assert_close(model(x, torch.tensor([0, 0])), x)


def test_activation_checkpointing_changes_nothing(randomized: Callable[[nn.Module], nn.Module]) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = randomized(small(attention_resolutions=(8,), activation_checkpointing=checkpointing).build())
        model.train()(pictures(), torch.tensor([1, 2])).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("context_dim", [None, 12])
def test_compiles_without_graph_breaks(
    randomized: Callable[[nn.Module], nn.Module], context_dim: int | None, checkpointing: bool
) -> None:
    config = small(attention_resolutions=(8,), activation_checkpointing=checkpointing)
    model = randomized(config.build(context_dim=context_dim))
    context = None if context_dim is None else torch.randn(2, 5, context_dim)
    with torch.no_grad():
        cond = model.prepare(torch.randn(2, 64), context)
        other = model.prepare(torch.randn(2, 64), context)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, timesteps = pictures(), torch.tensor([1, 999])
    weights = [model.stem.weight, model.middle[0].attention.qkv.weight, model.up[0].residual.conv_in.weight]
    results = []
    for network in (compiled, model):
        output = network(x, timesteps, cond)
        results.append((output, *torch.autograd.grad(output.square().mean(), weights)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):  # neither new timesteps nor new conditions
        compiled(x + 1, timesteps - 1, other)


def test_dropout_acts_in_training_only(randomized: Callable[[nn.Module], nn.Module]) -> None:
    model, timesteps = randomized(small(dropout=0.5).build()), torch.tensor([1, 2])
    torch.testing.assert_close(model(pictures(), timesteps), model(pictures(), timesteps))
    model.train()
    assert not torch.allclose(model(pictures(), timesteps), model(pictures(), timesteps))


def test_sizes_that_cannot_be_halved_are_refused() -> None:
    with pytest.raises(ValueError, match="18 x 16 pixels: both must be multiples of 4"):
        small(patch_size=2).build()(torch.zeros(1, 3, 18, 16), torch.zeros(1))


def test_context_must_fit_the_net() -> None:
    x, timesteps, context = pictures(1), torch.zeros(1), torch.zeros(1, 2, 12)
    without = small(attention_resolutions=(8,)).build()
    with_context = small(attention_resolutions=(8,)).build(context_dim=12)
    with pytest.raises(ValueError, match="context is given"):
        without.prepare(context=context)
    with pytest.raises(ValueError, match="context is given"):
        without(x, timesteps, with_context.prepare(context=context))
    with pytest.raises(ValueError, match="context is missing"):
        with_context.prepare()
    with pytest.raises(ValueError, match="context is missing"):
        with_context(x, timesteps)


def test_prepared_rows_are_those_of_the_singles(randomized: Callable[[nn.Module], nn.Module]) -> None:
    """Keys and values can be picked and joined like any condition."""
    model, x, timesteps = (
        randomized(small(attention_resolutions=(8,)).build(context_dim=12)),
        pictures(3),
        torch.arange(3),
    )
    embedding, context = torch.randn(3, 64), torch.randn(3, 5, 12)
    mask = torch.arange(5) < torch.tensor([[1], [3], [5]])
    cond = model.prepare(embedding, context, mask)
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(model(x[rows], timesteps[rows], cond.select(rows)), model(x, timesteps, cond)[rows])
    joined = cond.select(torch.tensor([0])).cat(cond.select(torch.tensor([1, 2])))
    torch.testing.assert_close(model(x, timesteps, joined), model(x, timesteps, cond))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 18, "patch_size": 2}, "image_size = 18: must be a multiple of 4"),
        ({"attention_resolutions": (32,)}, r"32 is none of this net's feature maps, \[16, 8\]"),
        ({"attention_resolutions": (8,), "head_channels": 12}, "head_channels = 12: does not divide width 32 at 8"),
        (
            {"attention_resolutions": (16,), "channels": 24, "channel_mult": (2, 3), "head_channels": 48},
            "the middle, 72",
        ),
        ({"channel_mult": (1, 0)}, "every factor must be at least 1"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_time_embedding_is_four_times_as_wide() -> None:
    model = UNet(small())
    assert model.config.embedding_dim == 64
    assert [math.prod(layer.weight.shape) for layer in (model.time_embed.layers[0], model.time_embed.layers[2])] == [
        16 * 64,
        64 * 64,
    ]
