from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from unclip.config.base import ConfigError
from unclip.models.classifier import AttentionPool, ClassifierConfig, ClassifierModel

ADM = {"channels": 128, "attention_resolutions": (32, 16, 8), "head_channels": 64}
TINY = {
    "channels": 16,
    "channel_mult": (1, 2),
    "depth": 1,
    "attention_resolutions": (4,),
    "head_channels": 16,
    "image_size": 8,
}
Randomized = Callable[[nn.Module], nn.Module]


def tiny(randomized: Randomized, **changes: Any) -> ClassifierModel:
    model = ClassifierConfig.from_dict({"encoder": TINY | changes}).build(num_classes=3)
    assert isinstance(randomized(model), ClassifierModel)
    return model


def inputs(count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 8, 8, generator=generator), torch.tensor([0, 40, 999])[:count]


@pytest.mark.parametrize(
    ("image_size", "channel_mult", "depth", "millions"),
    [(64, (1, 2, 3, 4), 4, 65), (128, (1, 1, 2, 3, 4), 2, 43), (256, (1, 1, 2, 2, 4, 4), 2, 54)],
)
def test_adms_classifiers_have_their_published_size(
    image_size: int, channel_mult: tuple[int, ...], depth: int, millions: int
) -> None:
    """Dhariwal and Nichol 2021, table of classification models: 1000 classes, sizes rounded to millions."""
    shape = {"image_size": image_size, "channel_mult": channel_mult, "depth": depth}
    with torch.device("meta"):
        model = ClassifierConfig.from_dict({"encoder": ADM | shape}).build(num_classes=1000)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == millions


def test_the_pool_is_an_attention_of_the_mean_over_everything(randomized: Randomized) -> None:
    channels, heads, side = 8, 2, 3
    pool = AttentionPool(channels, 5, side=side, heads=heads)
    randomized(pool)
    x = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))
    tokens = x.flatten(2).transpose(1, 2)
    tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) + pool.positions
    width, found = channels // heads, []
    for head in range(heads):
        rows = slice(head * width, (head + 1) * width)
        query = tokens[:, :1] @ pool.query.weight[rows].T + pool.query.bias[rows]
        both = slice(2 * head * width, 2 * (head + 1) * width)
        key, value = (tokens @ pool.key_value.weight[both].T + pool.key_value.bias[both]).split(width, dim=2)
        weights = (query @ key.transpose(1, 2) / width**0.5).softmax(dim=2)
        found.append((weights @ value)[:, 0])
    expected = torch.cat(found, dim=1) @ pool.out.weight.T + pool.out.bias
    torch.testing.assert_close(pool(x), expected)


def test_logits_depend_on_picture_timestep_and_place_but_not_on_the_batch(randomized: Randomized) -> None:
    model, (x_t, timesteps) = tiny(randomized), inputs()
    logits = model(x_t, timesteps)
    assert logits.shape == (3, 3)
    for row in range(3):
        torch.testing.assert_close(model(x_t[row : row + 1], timesteps[row : row + 1])[0], logits[row])
    assert (model(x_t, timesteps.flip(0))[[0, 2]] - logits[[0, 2]]).abs().max() > 1e-3
    assert (model(x_t.roll(3, dims=3), timesteps) - logits).abs().max() > 1e-3  # positions of the pool


def test_every_parameter_has_a_part_in_the_logits(randomized: Randomized) -> None:
    model = tiny(randomized).requires_grad_(True)
    model(*inputs()).square().sum().backward()
    idle = {name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    assert not idle


def test_bfloat16_networks_give_float32_logits(randomized: Randomized) -> None:
    model, (x_t, timesteps) = tiny(randomized), inputs()
    expected = model(x_t, timesteps)
    found = model.bfloat16()(x_t, timesteps)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_activation_checkpointing_changes_no_gradient(randomized: Randomized) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny(randomized, activation_checkpointing=checkpointing)
        x_t, timesteps = inputs()
        x_t.requires_grad_()
        model(x_t, timesteps).square().sum().backward()
        gradients.append([x_t.grad, *(parameter.grad for parameter in model.parameters())])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_pictures_of_another_size_are_refused(randomized: Randomized) -> None:
    with pytest.raises(ValueError, match=r"x_t is \(1, 3, 16, 16\): expected \(B, 3, 8, 8\)"):
        tiny(randomized)(torch.zeros(1, 3, 16, 16), torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_channels": 6}, "encoder.out_channels = 6: .* leave it at encoder.in_channels = 3"),
        ({"head_channels": 24, "attention_resolutions": ()}, "encoder.head_channels = 24: .* pool's width 32"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClassifierConfig.from_dict({"encoder": TINY | changes})
