"""Captions through a CLIP text transformer inside prior and decoder: states that see no padding, the empty caption for a
dropped one, nothing that is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from unclip.models.clip_text import ClipTextConfig
from unclip.models.conditioners import CaptionCondition, ClipCaptionConfig, ImageCondition
from unclip.models.decoder import DecoderCondition, DecoderConfig
from unclip.models.prior import PriorCondition, PriorConfig
from unclip.models.text import TextTransformerConfig, caption_mask
from unclip.models.unet import UNetConfig
from unclip.training.objectives import DecoderObjectiveConfig, PriorObjectiveConfig

LENGTH, VOCABULARY, D = 8, 50, 6
START, END = VOCABULARY - 2, VOCABULARY - 1
TEXT = ClipTextConfig(
    vocab_size=VOCABULARY, context_length=LENGTH, width=10, depth=2, heads=2, embed_dim=D, quick_gelu=True
)
PRIOR = PriorConfig(
    embed_dim=D, vocab_size=VOCABULARY, context_length=LENGTH, width=32, depth=2, heads=4, clip_text=TEXT
)
UNET = UNetConfig(
    out_channels=6,
    channels=16,
    channel_mult=(1, 2),
    depth=1,
    attention_resolutions=(8,),
    head_channels=8,
    image_size=16,
)
DECODER = DecoderConfig(unet=UNET, clip_text=ClipCaptionConfig(encoder=TEXT, width=24), embed_dim=D)
TOKENS = torch.tensor([[START, 3, 4, END, 0, 0, 0, 0], [START, 7, END, 0, 0, 0, 0, 0]])
EMPTY = torch.tensor([[START, END, 0, 0, 0, 0, 0, 0]]).expand(2, -1)
DROPPED, KEPT = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)
GENERATOR = torch.Generator().manual_seed(1)
X, Z = torch.randn(2, 3, 16, 16, generator=GENERATOR), torch.randn(2, D, generator=GENERATOR)
TIMESTEPS = torch.tensor([3, 999])

Randomized = Callable[[nn.Module], nn.Module]


def told_prior(tokens: torch.Tensor, dropped: torch.Tensor = KEPT) -> PriorCondition:
    return PriorCondition.of_captions(torch.ones(2, D), tokens, dropped)


def told_decoder(tokens: torch.Tensor, dropped: torch.Tensor = KEPT) -> DecoderCondition:
    caption = CaptionCondition(dropped=dropped, tokens=tokens, mask=caption_mask(tokens))
    return DecoderCondition(image=ImageCondition(dropped=KEPT, embed=Z), text=caption)


def test_the_embedding_is_the_projected_state_at_the_end_of_the_caption(randomized: Randomized) -> None:
    encoder = randomized(TEXT.build())
    states, embed = encoder(TOKENS, caption_mask(TOKENS))
    ends = states[torch.arange(2), TOKENS.argmax(dim=1)]
    torch.testing.assert_close(embed, ends @ encoder.tower.text_projection)
    changed = torch.where(caption_mask(TOKENS), TOKENS, 9)
    again, _ = encoder(changed, caption_mask(TOKENS))
    torch.testing.assert_close(again[caption_mask(TOKENS)], states[caption_mask(TOKENS)], rtol=0, atol=0)


def test_activations_differ() -> None:
    quick, plain = TEXT.build(), TEXT.model_copy(update={"quick_gelu": False}).build()
    plain.load_state_dict(quick.state_dict())
    mask = caption_mask(TOKENS)
    assert not torch.allclose(quick(TOKENS, mask)[0], plain(TOKENS, mask)[0], atol=1e-6)


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_captions_matter_and_a_dropped_one_is_the_empty_one(randomized: Randomized, stage: str) -> None:
    model = randomized((PRIOR if stage == "prior" else DECODER).build())
    told, x = (told_prior, Z) if stage == "prior" else (told_decoder, X)
    outputs = {
        "caption": model(x, TIMESTEPS, told(TOKENS)),
        "dropped": model(x, TIMESTEPS, told(TOKENS, DROPPED)),
        "empty": model(x, TIMESTEPS, told(EMPTY)),
        "prepared": model(x, TIMESTEPS, model.prepare(told(TOKENS))),
        "mixed": model(x, TIMESTEPS, told(TOKENS, torch.tensor([True, False]))),
    }
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(outputs["dropped"], outputs["empty"], **close)
    torch.testing.assert_close(outputs["prepared"], outputs["caption"], **close)
    torch.testing.assert_close(outputs["mixed"][:1], outputs["dropped"][:1], **close)
    torch.testing.assert_close(outputs["mixed"][1:], outputs["caption"][1:], **close)
    assert (outputs["caption"] - outputs["empty"]).abs().flatten(1).amax(dim=1).min() > 1e-3


def test_the_prior_sees_the_text_embedding_through_its_own_transformer_alone(randomized: Randomized) -> None:
    model, cond = randomized(PRIOR.build()), told_prior(TOKENS)
    other = dataclasses.replace(cond, text_embed=-cond.text_embed)
    torch.testing.assert_close(model(Z, TIMESTEPS, other), model(Z, TIMESTEPS, cond), rtol=0, atol=0)


def test_the_transformer_is_frozen() -> None:
    model = PRIOR.build()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name in model.state_dict() if name.startswith("prefix.encoder.tower.")}


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"clip_text\.context_length = 8: must be context_length = 9"):
        PriorConfig(embed_dim=D, vocab_size=VOCABULARY, context_length=9, width=8, depth=1, heads=1, clip_text=TEXT)
    text = TextTransformerConfig(vocab_size=VOCABULARY, context_length=LENGTH, width=24, depth=1, heads=4)
    with pytest.raises(ValidationError, match="text, text_states and clip_text exclude each other"):
        DecoderConfig(unet=UNET, clip_text=DECODER.clip_text, text=text, embed_dim=D)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unit_norm": False}, "stage.unit_norm = False"),
        ({}, "stage.model.clip_text"),
    ],
)
@pytest.mark.parametrize("objective", [PriorObjectiveConfig, DecoderObjectiveConfig])
def test_training_refuses_what_it_has_no_data_for(
    objective: type[PriorObjectiveConfig] | type[DecoderObjectiveConfig], changes: dict[str, bool], message: str
) -> None:
    stage = {"diffusion": {}, "sampling": {}, "normalizer": {}, **changes}
    if objective is DecoderObjectiveConfig:
        stage |= {"model": DECODER.to_dict(), "diffusion": {"variance_type": "learned_range"}, "image_size": 16}
    else:
        stage |= {"model": PRIOR.to_dict()}
    with pytest.raises(ValidationError, match=message):
        objective.model_validate({"stage": stage})
