"""A way gone in parts, each in an engine that has its stages alone, ends at the pictures of one engine with all of them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.engines import assert_same_pictures, made, randomized, unit

from unclip.config.base import ConfigError
from unclip.generation.engine.config import EngineConfig
from unclip.generation.engine.engine import Engine
from unclip.generation.engine.request import EncodedCaption, Picture, Request
from unclip.generation.engine.route import Stages, plan_request, plan_route
from unclip.pipelines.bundle import Bundle, BundleError, save_stage
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.known import known_at
from unclip.pipelines.pipeline import Pipeline
from unclip.pipelines.stages import DecoderStage, stage_config_from_dict

CLIP_GUIDE = {
    "kind": "noised_clip",
    "model": {
        "embed_dim": 8,
        "image_size": 16,
        "patch_size": 4,
        "width": 16,
        "depth": 1,
        "heads": 2,
        "text": {"context_length": 12, "width": 16, "depth": 1, "heads": 2},
    },
    "diffusion": {"num_train_timesteps": 50},
}
STATES = {"model": {"text": None, "text_states": {"context_length": 16, "state_dim": 16, "width": 8}}}
GUIDED = GenerationOptions().merged({"decoder": {"clip_guidance_scale": 30.0}})
UPSAMPLERS = ("upsampler_256", "upsampler_1024")


def engine_of(stages: Stages) -> Engine:
    return Engine(stages, EngineConfig(memory_bytes=2**33))


@pytest.fixture(scope="module")
def bundle(tiny_bundle: str, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle, and a guide."""
    uri = tmp_path_factory.mktemp("bundles") / "guided"
    shutil.copytree(tiny_bundle, uri)
    guide = stage_config_from_dict(CLIP_GUIDE)
    save_stage(str(uri), guide, tensors=randomized(guide).state_dict(), clip=None, provenance={})
    return Bundle.load(str(uri))


@pytest.fixture(scope="module")
def parts(bundle: Bundle) -> list[Engine]:
    """Prior, decoder and upsamplers."""
    names = (("clip", "prior"), ("decoder",), UPSAMPLERS)
    return [engine_of(Stages.load(bundle, part, options=GUIDED)) for part in names]


@pytest.fixture(scope="module")
def whole(bundle: Bundle) -> Engine:
    return engine_of(Stages.load(bundle, ("clip", "prior", "decoder", *UPSAMPLERS), options=GUIDED))


def in_parts(parts: list[Engine], request: Request) -> dict[int, Picture]:
    """One engine after the other, each given what the one before made."""
    prior, decoder, upsamplers = parts
    embed = made(prior, replace(request, stages=("prior",))).image_embed
    drawn = made(decoder, replace(request, stages=("decoder",), image_embed=embed)).images
    known = {size: pixels for size, pixels in request.known.items() if size > 16}
    rest = replace(request, stages=UPSAMPLERS, low_res=drawn[16], x_T=None, known=known)
    return {**drawn, **made(upsamplers, rest).images}


def known_pixels() -> Mapping[int, Any]:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, :, :32] = True
    return known_at(torch.from_numpy(pixels), mask, (16, 32, 64), feather=0.05)


OTHER_SAMPLERS = {
    "prior": {"sampler": "dpmsolver++", "num_inference_steps": 4, "guidance_scale": 3.0},
    "decoder": {"sampler": "ddim", "eta": 1.0, "num_inference_steps": 5},
    "upsampler_256": {"sampler": "ddpm", "num_inference_steps": 3},
    "upsampler_1024": {"sampler": "sde-dpmsolver++", "num_inference_steps": 3},
}


@pytest.mark.parametrize(
    "request_",
    [
        Request(prompt="two dogs", seed=1),
        Request(prompt="a red apple", seed=2, options=GenerationOptions().merged(OTHER_SAMPLERS)),
        Request(prompt="a red apple", seed=2, options=GUIDED),
        Request(prompt="two dogs", seed=3, known=known_pixels()),
        Request(prompt="two dogs", seed=3, x_T=torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))),
        Request(prompt="two dogs", seed=4, negative_prompt="a red apple"),
    ],
    ids=["plain", "samplers", "guided", "known", "x_T", "negative"],
)
def test_parts_one_after_the_other_are_the_whole(parts: list[Engine], whole: Engine, request_: Request) -> None:
    assert_same_pictures(in_parts(parts, request_), made(whole, request_).images)


def test_one_engine_goes_parts_of_the_way_too(whole: Engine) -> None:
    expected = made(whole, Request(prompt="two dogs", seed=1))
    prior = made(whole, Request(prompt="two dogs", seed=1, stages=("prior",)))
    assert prior.images == {}
    assert list(prior.settings["sampling"]) == ["prior"]
    torch.testing.assert_close(prior.image_embed, expected.image_embed)
    small = made(whole, Request(prompt="two dogs", seed=1, stages=("prior", "decoder", "upsampler_256")))
    assert_same_pictures(small.images, {size: expected.images[size] for size in (16, 32)})


def test_a_decoder_that_is_given_no_embedding_sees_none(bundle: Bundle, parts: list[Engine]) -> None:
    """The caption alone, as in figure 8 of the paper."""
    request = Request(prompt="two dogs", seed=5, stages=("decoder",))
    blind = made(parts[1], request)
    draw = Pipeline.from_bundle(bundle).draw([5], options=GenerationOptions(up_to=16))
    assert blind.image_embed is None
    assert_same_pictures(blind.images, {16: draw.decode(prompts=["two dogs"])[0].numpy()})
    seeing = made(parts[1], replace(request, image_embed=unit(0)))
    assert np.abs(seeing.images[16].astype(int) - blind.images[16]).max() > 5


def test_an_encoding_takes_the_place_of_a_clip(bundle: Bundle, whole: Engine) -> None:
    """The prior's, of prompt and negative prompt."""
    clip = bundle.load_clip()
    embeds = clip.encode_text(clip.tokenize(["two dogs", "a red apple"]))
    request = Request(prompt="two dogs", negative_prompt="a red apple", seed=3)
    encoded = replace(
        request, encoded=EncodedCaption(embeds[0]), negative_encoded=EncodedCaption(embeds[1]), stages=("prior",)
    )
    found = made(engine_of(Stages.load(bundle, ("prior",))), encoded)
    torch.testing.assert_close(found.image_embed, made(whole, request).image_embed, rtol=1e-4, atol=1e-4)


def test_an_encoding_counts_in_place_of_the_engines_own(whole: Engine) -> None:
    """And is no other request's, of whatever has the same prompt."""
    request = Request(prompt="two dogs", seed=3, stages=("prior",))
    own = made(whole, request).image_embed
    other = made(whole, replace(request, encoded=EncodedCaption(unit(1)))).image_embed
    assert not torch.allclose(own, other, atol=1e-2)
    torch.testing.assert_close(made(whole, request).image_embed, own)


def test_states_of_captions_take_the_place_of_a_clip(pipeline: Pipeline) -> None:
    """A decoder that is told them."""
    config = pipeline.decoder.config.merged(STATES)
    decoder = DecoderStage(config, randomized(config))
    told = made(engine_of(Stages({"decoder": decoder}, pipeline.clip)), states_request(None))
    clip = pipeline.clip
    assert clip is not None
    embeds, states = clip.encode_text_states(clip.tokenize(["two dogs"]))
    found = made(engine_of(Stages({"decoder": decoder})), states_request(EncodedCaption(embeds[0], states[0])))
    assert_same_pictures(found.images, told.images)
    for wrong in (EncodedCaption(embeds[0]), EncodedCaption(embeds[0], states[0, 1:])):
        with pytest.raises(ValueError, match=r"encoded.text_states must be \(16, 16\) of finite numbers, and is"):
            engine_of(Stages({"decoder": decoder})).submit(states_request(wrong))


def states_request(encoded: EncodedCaption | None) -> Request:
    return Request(prompt="two dogs", image_embed=unit(2), encoded=encoded, seed=1)


def test_a_request_is_planned_without_weights(bundle: Bundle, whole: Engine) -> None:
    """As the engine plans it; what is refused there is refused here."""
    request = Request(prompt="two dogs", options=GenerationOptions().merged({"up_to": 32, **OTHER_SAMPLERS}))
    planned = plan_request(request, bundle.configs)
    assert list(planned.sampling) == ["prior", "decoder", "upsampler_256"]
    assert planned.settings == made(whole, request).settings
    with pytest.raises(ConfigError, match=r"options.up_to = 17: the bundle makes"):
        plan_request(Request(prompt="two dogs", options=GenerationOptions(up_to=17)), bundle.configs)


PICTURE = np.zeros((16, 16, 3), np.uint8)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(prompt="a"), "the request goes through prior, upsampler_256, upsampler_1024; .* loaded decoder, noised_clip$"),
        (Request(prompt="a", stages=("prior",)), "the request goes through prior; .* loaded decoder"),
        (Request(low_res=PICTURE), "the request goes through upsampler_256, upsampler_1024; .* loaded decoder"),
        (Request(prompt="a", stages=()), "stages = none: the request goes through prior, decoder, upsampler_256, up"),
        (Request(prompt="a", stages=("upsampler_256",)), "stages = upsampler_256: the request goes through prior, dec"),
        (Request(prompt="a", stages=("decoder", "prior")), "stages = decoder, prior: the request goes through decoder"),
        (Request(low_res=PICTURE, stages=("decoder",)), "stages = decoder: the request goes through upsampler_256"),
        (Request(image_embed=unit(0), stages=("prior",)), "stages = prior: the request goes through decoder"),
        (Request(stages=("decoder",)), "prompt, image_embed, low_res: none is given"),
        (Request(prompt="a", encoded=EncodedCaption(torch.ones(8)), stages=("prior",)), "encoded.text_embed must be of unit"),
        (Request(prompt="a", encoded=EncodedCaption(unit(0, 4)), stages=("prior",)), r"encoded.text_embed must be \(8,\), not"),
        (Request(image_embed=unit(0), encoded=EncodedCaption(unit(0))), "encoded is given without what it is the encoding"),
        (Request(prompt="a", negative_prompt="b" * 3000), "negative_prompt has 3000 characters; at most 2000"),
    ],
)  # fmt: skip
def test_what_a_part_cannot_do_is_refused_at_once(parts: list[Engine], request_: Request, message: str) -> None:
    with pytest.raises((ValueError, ConfigError, BundleError), match=message):
        parts[1].submit(request_)


def test_a_prompt_without_a_clip_is_refused_where_it_is_needed(bundle: Bundle) -> None:
    stages = Stages.load(bundle, ("prior",))
    encoded = Request(prompt="a", encoded=EncodedCaption(unit(0)), stages=("prior",))
    assert list(plan_route(encoded, stages).sampling) == ["prior"]
    with pytest.raises(ConfigError, match=r"^prompt: needs a CLIP, and this engine has none; give its encoding"):
        plan_route(replace(encoded, encoded=None), stages)
    with pytest.raises(ConfigError, match=r"^negative_prompt: needs a CLIP"):
        plan_route(replace(encoded, negative_prompt="b"), stages)


def test_only_what_is_named_is_loaded(bundle: Bundle) -> None:
    assert list(Stages.load(bundle, UPSAMPLERS).networks) == list(UPSAMPLERS)
    assert list(Stages.load(bundle, ("clip", "decoder")).networks) == ["clip", "decoder"]
    assert list(Stages.load(bundle, ("decoder", "prior"), options=GUIDED).networks) == [
        "noised_clip",
        "prior",
        "decoder",
    ]
    assert list(Stages.load(bundle, ("prior",), options=GUIDED).networks) == ["prior"]
    with pytest.raises(BundleError, match="an engine cannot load noised_clip of clip, noised_clip, prior"):
        Stages.load(bundle, ("noised_clip",))


def test_a_guide_that_is_not_loaded_is_named(bundle: Bundle) -> None:
    stages = Stages.load(bundle, ("decoder",))
    with pytest.raises(BundleError, match=r"the request goes through noised_clip; .* loaded decoder"):
        plan_route(Request(prompt="a", image_embed=unit(0), stages=("decoder",), options=GUIDED), stages)


def test_an_engine_without_stages_is_refused(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match="stages: an engine needs one at least"):
        engine_of(Stages.load(bundle, ("clip",)))
