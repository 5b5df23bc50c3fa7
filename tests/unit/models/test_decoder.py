from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

from unclip.models.decoder import DecoderCondition, DecoderConfig, DecoderModel
from unclip.models.text import TextTransformerConfig
from unclip.models.unet import UNetConfig

CONFIG = DecoderConfig(
    unet=UNetConfig(
        out_channels=6,
        channels=16,
        channel_mult=(1, 2),
        depth=1,
        attention_resolutions=(8,),
        head_channels=8,
        image_size=16,
    ),
    text=TextTransformerConfig(vocab_size=50, context_length=8, width=24, depth=1, heads=4),
    embed_dim=6,
)
X_T = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
TIMESTEPS = torch.tensor([3, 999])


@pytest.fixture
def model(randomized: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return randomized(CONFIG.build())


def make_condition(image_dropped: bool = False, text_dropped: bool = False) -> DecoderCondition:
    generator = torch.Generator().manual_seed(1)
    return DecoderCondition(
        image_embed=torch.randn(2, 6, generator=generator),
        tokens=torch.randint(50, (2, 8), generator=generator),
        text_mask=(torch.arange(8) < 5).expand(2, 8),
        image_dropped=torch.full((2,), image_dropped),
        text_dropped=torch.full((2,), text_dropped),
    )


def with_other_image(cond: DecoderCondition) -> DecoderCondition:
    return dataclasses.replace(cond, image_embed=-cond.image_embed)


def with_other_text(cond: DecoderCondition) -> DecoderCondition:
    return dataclasses.replace(cond, tokens=(cond.tokens + 1) % 50, text_mask=(torch.arange(8) < 3).expand(2, 8))


def distance(model: nn.Module, one: DecoderCondition, other: DecoderCondition) -> float:
    """Largest difference of the outputs for the sample where it is least."""
    difference = (model(X_T, TIMESTEPS, one) - model(X_T, TIMESTEPS, other)).abs()
    return difference.flatten(1).amax(dim=1).min().item()


@pytest.mark.parametrize("text_dropped", [False, True])
def test_image_embedding_matters_unless_dropped(model: nn.Module, text_dropped: bool) -> None:
    kept, dropped = make_condition(False, text_dropped), make_condition(True, text_dropped)
    assert distance(model, kept, with_other_image(kept)) > 1e-2
    assert distance(model, dropped, with_other_image(dropped)) == 0
    assert distance(model, kept, dropped) > 1e-2


@pytest.mark.parametrize("image_dropped", [False, True])
def test_caption_matters_unless_dropped(model: nn.Module, image_dropped: bool) -> None:
    kept, dropped = make_condition(image_dropped, False), make_condition(image_dropped, True)
    assert distance(model, kept, with_other_text(kept)) > 1e-2
    assert distance(model, dropped, with_other_text(dropped)) == 0
    assert distance(model, kept, dropped) > 1e-2


@pytest.mark.parametrize(
    ("silenced", "expected"),
    [
        (("image_to_time",), True),
        (("image_to_tokens",), True),
        (("image_to_time", "image_to_tokens"), False),
    ],
)
def test_image_embedding_has_two_ways_in(model: DecoderModel, silenced: tuple[str, ...], expected: bool) -> None:
    for name in silenced:
        nn.init.zeros_(getattr(model, name).weight)
    assert (distance(model, make_condition(), with_other_image(make_condition())) > 1e-3) == expected


@pytest.mark.parametrize(
    ("silence_pooled", "silence_context", "expected"), [(True, False, True), (False, True, True), (True, True, False)]
)
def test_caption_has_two_ways_in(
    model: DecoderModel, silence_pooled: bool, silence_context: bool, expected: bool
) -> None:
    if silence_pooled:
        nn.init.zeros_(model.text_to_time.weight)
    if silence_context:
        for name, parameter in model.named_parameters():
            if "context_kv.weight" in name:
                nn.init.zeros_(parameter)
    assert (distance(model, make_condition(), with_other_text(make_condition())) > 1e-3) == expected


def test_unconditional_depends_on_picture_and_time(model: nn.Module) -> None:
    cond = make_condition().unconditional()
    output = model(X_T, TIMESTEPS, cond)
    assert (output - model(X_T + 0.1, TIMESTEPS, cond)).abs().amax() > 1e-2
    assert (output - model(X_T, TIMESTEPS - 2, cond)).abs().amax() > 1e-3


def test_padding_does_not_matter(model: nn.Module) -> None:
    cond = make_condition()
    tokens = torch.cat([cond.tokens[:, :5], (cond.tokens[:, 5:] + 1) % 50], dim=1)
    assert distance(model, cond, dataclasses.replace(cond, tokens=tokens)) == 0


def test_batch_equals_singles(model: nn.Module) -> None:
    cond = make_condition()
    together = model(X_T, TIMESTEPS, cond)
    for row in range(2):
        only = slice(row, row + 1)
        single = DecoderCondition(**{name: tensor[only] for name, tensor in cond.tensors().items()})
        torch.testing.assert_close(model(X_T[only], TIMESTEPS[only], single), together[only], rtol=1e-4, atol=1e-4)


def test_output_starts_at_zero_and_trains_in_bfloat16() -> None:
    model = CONFIG.build().bfloat16()
    output = model(X_T, TIMESTEPS, make_condition())
    assert output.shape == (2, 6, 16, 16)
    assert output.dtype == torch.float32
    assert not output.any()
    (output - 1).square().mean().backward()
    assert model.unet.head.weight.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_bfloat16_agrees_with_float32(model: nn.Module) -> None:
    exact = model(X_T, TIMESTEPS, make_condition())
    rounded = model.bfloat16()(X_T, TIMESTEPS, make_condition())
    assert (rounded - exact).std() / exact.std() < 0.05


def test_decoder_without_attention_is_refused() -> None:
    unet = CONFIG.unet.model_copy(update={"attention_resolutions": ()})
    with pytest.raises(ValueError, match="attention_resolutions"):
        DecoderConfig(unet=unet, text=CONFIG.text, embed_dim=6)
