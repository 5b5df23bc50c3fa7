"""The stages one by one: the same pictures as all at once, tensors from anywhere, and what comes between."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from unclip.config.base import ConfigError
from unclip.pipelines.bundle import BundleError
from unclip.pipelines.cascade import GenerationOptions, plan_cascade
from unclip.pipelines.known import KnownPixels
from unclip.pipelines.pictures import to_signed, to_uint8
from unclip.pipelines.pipeline import Pipeline
from unclip.pipelines.stages import DecoderStage, StageConfig
from unclip.utils.random import SampleGenerator

PROMPTS, SEEDS = ["a red circle", "a blue heart"], [7, 8]


def options(**changes: object) -> GenerationOptions:
    return GenerationOptions().merged(changes)


def test_stage_by_stage_gives_the_same_pictures(tiny_pipeline: Pipeline) -> None:
    whole = tiny_pipeline(PROMPTS, SEEDS)
    draw = tiny_pipeline.draw(SEEDS)
    image_embed = draw.prior(PROMPTS, text_embed=tiny_pipeline.encode_text(PROMPTS))
    pictures = draw.decode(prompts=PROMPTS, image_embed=image_embed)
    assert torch.equal(image_embed, whole.image_embed)
    np.testing.assert_array_equal(pictures.numpy(), whole.images[16])
    for size, made in draw.upsample(pictures).items():
        np.testing.assert_array_equal(made.numpy(), whole.images[size])
    larger = draw.upsample(torch.from_numpy(whole.images[32]))  # beginning at a later stage
    assert set(larger) == {64}
    np.testing.assert_array_equal(larger[64].numpy(), whole.images[64])


def test_noise_from_elsewhere_is_begun_from(tiny_pipeline: Pipeline) -> None:
    """x_T of seed 7 under seed 1 is, without any noise of the steps, seed 7's picture."""
    still = options(decoder={"sampler": "ddim"}, up_to=16)
    z_i = tiny_pipeline.encode_text(PROMPTS)
    x_T = SampleGenerator.for_samples(0, torch.tensor(SEEDS)).child("decoder").normal((3, 16, 16))
    expected = tiny_pipeline.draw(SEEDS, options=still).decode(image_embed=z_i)
    moved = tiny_pipeline.draw([1, 1], options=still).decode(image_embed=z_i, x_T=x_T)
    assert torch.equal(moved, expected)
    assert not torch.equal(tiny_pipeline.draw([1, 1], options=still).decode(image_embed=z_i), expected)


def test_what_is_not_given_the_decoder_does_not_see(tiny_pipeline: Pipeline) -> None:
    """Of a caption alone the picture is that of any z_i whose row is dropped; of z_i alone that of any caption."""
    stage = tiny_pipeline.decoder
    z_i = tiny_pipeline.encode_text(PROMPTS)
    streams = SampleGenerator.for_samples(0, torch.tensor(SEEDS)).child("decoder")
    draw = tiny_pipeline.draw(SEEDS)
    for part, given in (("image", {"prompts": PROMPTS}), ("text", {"image_embed": z_i})):
        generator = SampleGenerator(streams.keys)
        tokens = tiny_pipeline.tokens(PROMPTS, 16)
        start = stage.begin(z_i, tokens, generator, dropped=(part,))
        expected = to_uint8(stage.run(start, generator, sampling=stage.config.sampling))
        assert torch.equal(draw.decode(**given), expected)
        both = draw.decode(prompts=PROMPTS, image_embed=z_i)
        assert not torch.equal(both, expected)


def test_predictions_can_be_watched(tiny_pipeline: Pipeline) -> None:
    """At the last step the prediction is what comes out; rows are those of the draw, whatever goes through together."""
    seen: list[tuple[str, slice, torch.Tensor]] = []
    output = tiny_pipeline(PROMPTS, SEEDS, options=options(max_pixels=1), watch=lambda *shown: seen.append(shown))
    embeds = [shown for stage, _, shown in seen if stage == "prior"]
    seen = seen[len(embeds) :]
    assert [embed.shape for embed in embeds] == [(1, 8)] * 2 * 3
    torch.testing.assert_close(torch.cat(embeds).norm(dim=1), torch.ones(6))
    torch.testing.assert_close(torch.cat([embeds[2], embeds[5]]), output.image_embed)
    assert not torch.allclose(embeds[0], embeds[2])
    unwatched = tiny_pipeline(PROMPTS, SEEDS, options=options(max_pixels=1))
    steps = {"decoder": 3, "upsampler_256": 2, "upsampler_1024": 2}
    assert [name for name, _, _ in seen] == [name for name, count in steps.items() for _ in range(2 * count)]
    for name, size in (("decoder", 16), ("upsampler_256", 32), ("upsampler_1024", 64)):
        np.testing.assert_array_equal(output.images[size], unwatched.images[size])
        last = {rows.start: pictures for stage, rows, pictures in seen if stage == name}
        np.testing.assert_array_equal(torch.cat([last[0], last[1]]).numpy(), output.images[size])


def test_a_pipeline_without_prior_draws_embeddings(tiny_bundle: str, tiny_pipeline: Pipeline) -> None:
    alone = Pipeline.from_bundle(tiny_bundle, with_prior=False)
    assert alone.prior is None
    z_i = tiny_pipeline.encode_text(PROMPTS)
    expected = tiny_pipeline.draw(SEEDS).cascade_of(image_embed=z_i)
    found = alone.draw(SEEDS).cascade_of(image_embed=z_i)
    np.testing.assert_array_equal(found.images[64], expected.images[64])
    with pytest.raises(BundleError, match="needs the stage prior"):
        alone(PROMPTS, SEEDS)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"image_embed": torch.eye(8)[:3]}, ValueError, "image_embed has 3 rows for 2 seeds"),
        ({"image_embed": 2 * torch.eye(8)[:2]}, ValueError, "image_embed must be of unit norm"),
        ({"image_embed": torch.eye(8)[:2], "x_T": torch.zeros(2, 3, 8, 8)}, ValueError, "x_T must be"),
    ],
)
def test_tensors_that_do_not_suit_are_refused(tiny_pipeline: Pipeline, given, error, message: str) -> None:
    with pytest.raises(error, match=message):
        tiny_pipeline.draw(SEEDS).decode(**given)


def test_pictures_of_no_stage_are_refused(tiny_pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="pictures of 24 pixels: this cascade knows those of 16, 32, 64"):
        tiny_pipeline.draw([1]).upsample(torch.zeros(1, 24, 24, 3, dtype=torch.uint8))


@pytest.mark.parametrize("pictures", [torch.zeros(1, 16, 16, 3), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)])
def test_pictures_of_another_kind_are_refused(tiny_pipeline: Pipeline, pictures: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"pictures must be uint8 \(B, s, s, 3\), not torch.*"):
        tiny_pipeline.draw([1]).upsample(pictures)


def known(size: int, count: int = 2) -> KnownPixels:
    return KnownPixels(
        torch.zeros(count, size, size, 3, dtype=torch.uint8), torch.ones(count, size, size, dtype=torch.bool)
    )


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        ({8: known(8)}, r"known pixels of 8x8 pictures: what is to be drawn are those of 16, 32, 64"),
        ({16: known(16), 24: known(24)}, r"known pixels of 24x24 pictures"),
        ({32: known(16)}, r"known pixels at 32 must have a mask \(2, 32, 32\), not \(2, 16, 16\)"),
        ({16: known(16, 1)}, r"known pixels at 16 must have a mask \(2, 16, 16\), not \(1, 16, 16\)"),
    ],
)
def test_known_pixels_of_no_stage_are_refused_before_it_draws(tiny_pipeline: Pipeline, pixels, message: str) -> None:
    steps: list[object] = []
    draw = tiny_pipeline.draw(SEEDS, progress=lambda *step: steps.append(step))
    with pytest.raises(ValueError, match=message):
        draw.cascade_of(image_embed=tiny_pipeline.encode_text(PROMPTS), known=pixels)
    assert not steps


def test_known_pixels_of_what_is_there_already_are_refused(tiny_pipeline: Pipeline) -> None:
    pictures = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="known pixels of 32x32 pictures: what is to be drawn are those of 64"):
        tiny_pipeline.draw(SEEDS).upsample(pictures, known={32: known(32)})
    with pytest.raises(ValueError, match=r"known pixels at 16 must have a mask \(2, 16, 16\), not \(2, 32, 32\)"):
        tiny_pipeline.draw(SEEDS).decode(prompts=PROMPTS, known=known(32))


def test_a_decoder_that_is_told_no_z_i_has_none_drawn(tiny_pipeline: Pipeline) -> None:
    config = tiny_pipeline.decoder.config.merged({"model": {"embed_dim": None}})
    glide = Pipeline(DecoderStage(config, config.build()), clip=tiny_pipeline.clip, prior=tiny_pipeline.prior)
    with pytest.raises(ConfigError, match="the decoder is told tokens, not an image embedding: there is none to draw"):
        glide.draw(SEEDS).prior(PROMPTS)


def test_prompts_end_where_the_first_network_would_cut_them(tiny_configs: Mapping[str, StageConfig]) -> None:
    """CLIP reads them too, wherever a z_t is made of them."""
    for name, changes in (
        ("clip", {"architecture": {"context_length": 9}}),
        ("prior", {"model": {"context_length": 9}}),
    ):
        configs = {**tiny_configs, name: tiny_configs[name].merged(changes)}
        assert plan_cascade(configs, GenerationOptions()).context_length == 9  # type: ignore[arg-type]
    glide = {**tiny_configs, "decoder": tiny_configs["decoder"].merged({"model": {"embed_dim": None}})}
    short = {**glide, "clip": tiny_configs["clip"].merged({"architecture": {"context_length": 9}})}
    assert plan_cascade(short, GenerationOptions()).context_length == 16  # type: ignore[arg-type]


def test_guides_towards_a_prompt_need_one(tiny_pipeline: Pipeline) -> None:
    with pytest.raises((ConfigError, BundleError)):
        tiny_pipeline.draw([1], options=options(decoder={"clip_guidance_scale": 1.0}))


def test_signed_pictures_round_trip() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    assert torch.equal(to_uint8(to_signed(values)), values)
