from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from unclip.models.conditioners import (
    CaptionCondition,
    ImageCondition,
    LabelCondition,
    TextStatesCondition,
    TextStatesConfig,
)
from unclip.models.decoder import DecoderCondition, DecoderConfig, DecoderModel
from unclip.models.text import TextTransformerConfig
from unclip.models.unet import UNetConfig

TEXT = TextTransformerConfig(vocab_size=50, context_length=8, width=24, depth=1, heads=4)
STATES = TextStatesConfig(context_length=8, state_dim=10, width=24)
X_T = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
TIMESTEPS = torch.tensor([3, 999])
KEPT = torch.zeros(2, dtype=torch.bool)


def unet(**changes: Any) -> UNetConfig:
    shape = {
        "out_channels": 6,
        "channels": 16,
        "channel_mult": (1, 2),
        "depth": 1,
        "attention_resolutions": (8,),
        "head_channels": 8,
        "image_size": 16,
    }
    return UNetConfig(**(shape | changes))


CONFIGS = {
    "unclip": DecoderConfig(unet=unet(), text=TEXT, embed_dim=6),
    "karlo": DecoderConfig(unet=unet(), text_states=STATES, embed_dim=6),
    "glide": DecoderConfig(unet=unet(), text=TEXT),
    "image": DecoderConfig(unet=unet(), embed_dim=6),
    "adm": DecoderConfig(unet=unet(), num_classes=5),
    "all": DecoderConfig(unet=unet(in_channels=7), text=TEXT, embed_dim=6, num_classes=5, inpainting=True),
}
INPUTS = {
    "unclip": ("image", "text"),
    "karlo": ("image", "text"),
    "glide": ("text",),
    "image": ("image",),
    "adm": ("label",),
    "all": ("image", "text", "label"),
}
EACH_INPUT = [(name, part) for name, parts in INPUTS.items() for part in parts]


def make_condition(name: str, seed: int = 1) -> DecoderCondition:
    """For two samples; every input of it depends on `seed`."""
    generator = torch.Generator().manual_seed(seed)
    embed, states = torch.randn(2, 6, generator=generator), torch.randn(2, 8, 10, generator=generator)
    tokens, mask = torch.randint(50, (2, 8), generator=generator), (torch.arange(8) < 6 - seed).expand(2, 8)
    config = CONFIGS[name]
    text: CaptionCondition | TextStatesCondition | None = None
    if config.text is not None:
        text = CaptionCondition(dropped=KEPT, tokens=tokens, mask=mask)
    elif config.text_states is not None:
        text = TextStatesCondition(dropped=KEPT, states=states, mask=mask)
    known, known_mask = torch.randn(2, 3, 16, 16, generator=generator), torch.ones(2, 1, 16, 16)
    known_mask[:, :, :, 8:] = 0
    return DecoderCondition(
        image=ImageCondition(dropped=KEPT, embed=embed) if config.embed_dim else None,
        text=text,
        label=LabelCondition(dropped=KEPT, label=torch.tensor([seed, seed + 1])) if config.num_classes else None,
        known=known if config.inpainting else None,
        known_mask=known_mask if config.inpainting else None,
    )


def drop(cond: DecoderCondition, *parts: str) -> DecoderCondition:
    return dataclasses.replace(cond, **{part: getattr(cond, part).unconditional() for part in parts})


def distance(model: nn.Module, one: DecoderCondition, other: DecoderCondition) -> float:
    """Largest difference of the outputs for the sample where it is least."""
    difference = (model(X_T, TIMESTEPS, one) - model(X_T, TIMESTEPS, other)).abs()
    return difference.flatten(1).amax(dim=1).min().item()


@pytest.fixture
def build(randomized: Callable[[nn.Module], nn.Module]) -> Callable[[str], DecoderModel]:
    def apply(name: str) -> DecoderModel:
        model = randomized(CONFIGS[name].build())
        assert isinstance(model, DecoderModel)
        return model

    return apply


@pytest.mark.parametrize("others_dropped", [False, True])
@pytest.mark.parametrize(("name", "part"), EACH_INPUT)
def test_an_input_matters_unless_dropped(
    build: Callable[[str], DecoderModel], name: str, part: str, others_dropped: bool
) -> None:
    model = build(name)
    others = [other for other in INPUTS[name] if other != part] if others_dropped else []
    kept = drop(make_condition(name), *others)
    changed = dataclasses.replace(kept, **{part: getattr(make_condition(name, seed=2), part)})
    assert distance(model, kept, changed) > 1e-2
    assert distance(model, drop(kept, part), drop(changed, part)) == 0
    assert distance(model, kept, drop(kept, part)) > 1e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_unconditional_depends_on_picture_and_time_alone(build: Callable[[str], DecoderModel], name: str) -> None:
    model, cond = build(name), make_condition(name)
    other = dataclasses.replace(make_condition(name, seed=2), known=cond.known, known_mask=cond.known_mask)
    cond, other = cond.unconditional(), other.unconditional()
    output = model(X_T, TIMESTEPS, cond)
    torch.testing.assert_close(output, model(X_T, TIMESTEPS, other), rtol=0, atol=0)
    assert (output - model(X_T + 0.1, TIMESTEPS, cond)).abs().amax() > 1e-2
    assert (output - model(X_T, TIMESTEPS - 2, cond)).abs().amax() > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_prepared_is_the_same_exactly(build: Callable[[str], DecoderModel], name: str) -> None:
    model, cond = build(name), make_condition(name)
    raw = model(X_T, TIMESTEPS, cond)
    torch.testing.assert_close(model(X_T, TIMESTEPS, model.prepare(cond)), raw, rtol=0, atol=0)


def test_preparing_leaves_nothing_of_the_text_to_do(build: Callable[[str], DecoderModel]) -> None:
    """Steps run without the text transformer, the image projections and the context's keys and values."""
    model = build("unclip")
    prepared, expected = model.prepare(make_condition("unclip")), model(X_T, TIMESTEPS, make_condition("unclip"))
    model.conditioners = nn.ModuleDict()
    for module in model.modules():
        if getattr(module, "context_kv", None) is not None:
            module.context_kv = None
    torch.testing.assert_close(model(X_T, TIMESTEPS, prepared), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_batch_equals_singles(build: Callable[[str], DecoderModel], name: str) -> None:
    model = build(name)
    cond = dataclasses.replace(make_condition(name))
    together = model(X_T, TIMESTEPS, cond)
    prepared = model.prepare(cond)
    for row in range(2):
        rows = torch.tensor([row])
        for single in (cond.select(rows), prepared.select(rows)):
            output = model(X_T[rows], TIMESTEPS[rows], single)
            torch.testing.assert_close(output, together[rows], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("silenced", "expected"), [(("to_time",), True), (("to_tokens",), True), (("to_time", "to_tokens"), False)]
)
def test_image_embedding_has_two_ways_in(
    build: Callable[[str], DecoderModel], silenced: tuple[str, ...], expected: bool
) -> None:
    model, cond = build("image"), make_condition("image")
    for name in silenced:
        nn.init.zeros_(getattr(model.conditioners["image"], name).weight)
    assert (distance(model, cond, make_condition("image", seed=2)) > 1e-3) == expected


@pytest.mark.parametrize("name", ["unclip", "karlo"])
@pytest.mark.parametrize(
    ("silence_pooled", "silence_context", "expected"), [(True, False, True), (False, True, True), (True, True, False)]
)
def test_caption_has_two_ways_in(
    build: Callable[[str], DecoderModel], name: str, silence_pooled: bool, silence_context: bool, expected: bool
) -> None:
    model, cond = build(name), make_condition(name)
    if silence_pooled:
        nn.init.zeros_(model.conditioners["text"].to_time.weight)
    if silence_context:  # no value: whatever is looked at adds nothing
        for attention in (module for module in model.modules() if hasattr(module, "context_kv")):
            nn.init.zeros_(attention.context_kv.weight)
    mask = cond.text.mask if cond.text is not None else None
    other = make_condition(name, seed=2).text
    assert other is not None
    other = dataclasses.replace(other, mask=mask) if name == "karlo" else other
    assert (distance(model, cond, dataclasses.replace(cond, text=other)) > 1e-3) == expected


@pytest.mark.parametrize(("name", "field"), [("unclip", "tokens"), ("karlo", "states")])
def test_padding_does_not_matter(build: Callable[[str], DecoderModel], name: str, field: str) -> None:
    cond = make_condition(name)
    assert cond.text is not None
    padding = ~cond.text.mask.view(2, 8, *[1] * (getattr(cond.text, field).ndim - 2))
    tensor = torch.where(padding, 7, getattr(cond.text, field))
    changed = dataclasses.replace(cond, text=dataclasses.replace(cond.text, **{field: tensor}))
    assert not torch.equal(tensor, getattr(cond.text, field))
    assert distance(build(name), cond, changed) == 0


def test_each_class_and_no_class_are_told_apart(build: Callable[[str], DecoderModel]) -> None:
    model = build("adm")
    x_t, timesteps = X_T[:1].expand(6, -1, -1, -1), torch.full((6,), 500)
    dropped, label = torch.tensor([False] * 5 + [True]), torch.tensor([0, 1, 2, 3, 4, 0])
    outputs = model(x_t, timesteps, DecoderCondition(label=LabelCondition(dropped=dropped, label=label)))
    assert torch.pdist(outputs.flatten(1)).min() > 1e-2


# --- inpainting -------------------------------------------------------------------------------------------------------


def test_only_known_pixels_are_seen(build: Callable[[str], DecoderModel]) -> None:
    model, cond = build("all"), make_condition("all")
    assert cond.known is not None
    for part, matters in ((slice(0, 8), True), (slice(8, 16), False)):
        known = cond.known.clone()
        known[:, :, :, part] += 1
        assert (distance(model, cond, dataclasses.replace(cond, known=known)) > 1e-2) == matters


@pytest.mark.parametrize("patch_size", [1, 2])
def test_a_decoder_learns_inpainting_from_where_it_is(
    randomized: Callable[[nn.Module], nn.Module], patch_size: int
) -> None:
    shape = {"channels": 16, "channel_mult": (1, 2), "depth": 1, "image_size": 16, "patch_size": patch_size}
    before = randomized(DecoderConfig(unet=UNetConfig(**shape), num_classes=5).build())
    after = DecoderConfig(unet=UNetConfig(in_channels=7, **shape), num_classes=5, inpainting=True).build().eval()
    weights = before.state_dict()
    stem = weights["unet.stem.weight"]
    added = stem.new_zeros(stem.shape[0], 4 * patch_size**2, *stem.shape[2:])
    after.load_state_dict(weights | {"unet.stem.weight": torch.cat([stem, added], dim=1)})  # as `init_from` does
    cond, known = make_condition("adm"), make_condition("all")
    shown = dataclasses.replace(cond, known=known.known, known_mask=known.known_mask)
    torch.testing.assert_close(after(X_T, TIMESTEPS, shown), before(X_T, TIMESTEPS, cond), rtol=1e-5, atol=1e-5)
    after(X_T, TIMESTEPS, shown).square().mean().backward()
    added = after.unet.stem.weight.grad[:, 3 * patch_size**2 :]
    assert added.flatten(2).abs().sum(dim=(0, 2)).min() > 0


# --- precision, shape -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_output_starts_at_zero_and_trains_in_bfloat16(name: str) -> None:
    model = CONFIGS[name].build().bfloat16()
    output = model(X_T, TIMESTEPS, make_condition(name))
    assert output.shape == (2, 6, 16, 16)
    assert output.dtype == torch.float32
    assert not output.any()
    (output - 1).square().mean().backward()
    assert model.unet.head.weight.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_agrees_with_float32(build: Callable[[str], DecoderModel], name: str) -> None:
    model, cond = build(name), make_condition(name)
    exact = model(X_T, TIMESTEPS, cond)
    rounded = model.bfloat16()(X_T, TIMESTEPS, cond)
    assert (rounded - exact).std() / exact.std() < 0.05


def test_autocast_agrees_with_float32(build: Callable[[str], DecoderModel]) -> None:
    """Mixed precision as in training: weights in float32, the work in bfloat16."""
    model, cond = build("unclip"), make_condition("unclip")
    exact = model(X_T, TIMESTEPS, cond)
    (exact_gradient,) = torch.autograd.grad(exact.square().mean(), model.unet.stem.weight)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(X_T, TIMESTEPS, cond)
    (gradient,) = torch.autograd.grad(rounded.square().mean(), model.unet.stem.weight)
    assert 0 < (rounded - exact).std() / exact.std() < 0.05
    assert (gradient - exact_gradient).std() / exact_gradient.std() < 0.1


@pytest.mark.parametrize("name", ["unclip", "karlo", "adm"])
def test_compiles_without_graph_breaks(build: Callable[[str], DecoderModel], name: str) -> None:
    """From the raw condition, as in training, and from a prepared one, as in sampling."""
    model, cond = build(name), make_condition(name)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = model(X_T, TIMESTEPS, cond)
    torch.testing.assert_close(compiled(X_T, TIMESTEPS, cond), expected)
    torch.testing.assert_close(compiled(X_T, TIMESTEPS, model.prepare(cond)), expected)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unet": unet(attention_resolutions=()), "text": TEXT}, "attention_resolutions"),
        ({"unet": unet(attention_resolutions=()), "embed_dim": 6}, "attention_resolutions"),
        ({"unet": unet(), "text": TEXT, "text_states": STATES}, "text, text_states and clip_text exclude each other"),
        ({"unet": unet()}, "at least one input"),
    ],
)
def test_impossible_decoders_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**settings)


def test_a_decoder_by_class_needs_no_attention() -> None:
    assert DecoderConfig(unet=unet(attention_resolutions=()), num_classes=2).build()


def test_the_condition_must_have_the_decoders_inputs() -> None:
    model, cond = CONFIGS["unclip"].build(), make_condition("unclip")
    with pytest.raises(ValueError, match="the condition has image; this decoder wants exactly image, text"):
        model(X_T, TIMESTEPS, DecoderCondition(image=cond.image))
    with pytest.raises(
        ValueError, match="the condition has image, text, label; this decoder wants exactly image, text"
    ):
        model(X_T, TIMESTEPS, dataclasses.replace(cond, label=make_condition("adm").label))
    with pytest.raises(ValueError, match="known is given, but inpainting = False"):
        model(X_T, TIMESTEPS, dataclasses.replace(cond, known=X_T, known_mask=X_T[:, :1]))
    with pytest.raises(ValueError, match="known_mask is missing, but inpainting = True"):
        CONFIGS["all"].build().prepare(dataclasses.replace(make_condition("all"), known_mask=None))
