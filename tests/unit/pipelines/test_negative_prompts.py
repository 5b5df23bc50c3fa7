"""Negative prompts: guidance leads away from them by the formula, computed by hand from the networks themselves."""

from __future__ import annotations

import pytest
import torch
from tests.support.engines import randomized
from torch.nn import functional

from unclip.config.base import ConfigError
from unclip.models.conditioners import CaptionCondition, ImageCondition
from unclip.models.decoder import DecoderCondition
from unclip.models.prior import PriorCondition
from unclip.models.text import caption_mask
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.pictures import to_uint8
from unclip.pipelines.pipeline import Pipeline
from unclip.pipelines.stages import ARSamplingConfig, DecoderStage, PriorStage, stage_config_from_dict
from unclip.pipelines.stages.ar_prior import draw_codes
from unclip.utils.random import SampleGenerator

SCALE = 3.0
ONE_STEP = {"sampler": "ddim", "num_inference_steps": 1, "guidance_scale": SCALE}
OPTIONS = GenerationOptions().merged({"up_to": 16, "prior": ONE_STEP, "decoder": ONE_STEP})
PROMPTS, NEGATIVE = ["two dogs", "a red apple"], ["a house", ""]


def test_the_prior_is_led_by_the_formula(tiny_pipeline: Pipeline) -> None:
    """One step to the clean sample, which this network predicts itself."""
    stage = tiny_pipeline.prior
    assert isinstance(stage, PriorStage)
    config = stage.config.merged({"num_draws": 1})
    pipeline = Pipeline(tiny_pipeline.decoder, clip=tiny_pipeline.clip, prior=PriorStage(config, stage.network))
    drawn = pipeline.draw([0, 1], options=OPTIONS).prior(PROMPTS, negative_prompts=NEGATIVE)

    streams = SampleGenerator.for_samples(0, torch.tensor([0, 1])).child("prior").child("draw 0")
    x_T, t = streams.normal((8,)), torch.tensor([49, 49])
    told, away = (
        PriorCondition.of_captions(pipeline.encode_text(texts), pipeline.tokens(texts, 16))
        for texts in (PROMPTS, NEGATIVE)
    )
    negative, positive = stage.network(x_T, t, away), stage.network(x_T, t, told)
    expected = functional.normalize(0.3 * (negative + SCALE * (positive - negative)), dim=1)
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-5)


def test_the_decoder_is_led_by_the_formula_and_sees_no_embedding_there(tiny_pipeline: Pipeline) -> None:
    stage, embed = (
        tiny_pipeline.decoder,
        functional.normalize(torch.randn(2, 8, generator=torch.Generator().manual_seed(0))),
    )
    draw = tiny_pipeline.draw([0, 1], options=OPTIONS)
    drawn = draw.decode(prompts=PROMPTS, negative_prompts=NEGATIVE, image_embed=embed)

    x_T = SampleGenerator.for_samples(0, torch.tensor([0, 1])).child("decoder").normal((3, 16, 16))
    t, seen = torch.tensor([49, 49]), torch.zeros(2, dtype=torch.bool)

    def told(texts: list[str], image: ImageCondition) -> DecoderCondition:
        tokens = tiny_pipeline.tokens(texts, 16)
        return DecoderCondition(image, CaptionCondition(seen, tokens, caption_mask(tokens)))

    positive = stage.network(x_T, t, told(PROMPTS, ImageCondition(seen, embed / 0.3)))[:, :3]
    negative = stage.network(x_T, t, told(NEGATIVE, ImageCondition(~seen, torch.zeros(2, 8))))[:, :3]
    noise = negative + SCALE * (positive - negative)
    expected = to_uint8(stage.process.pred_x_start(noise, x_T, t))
    assert int((drawn.int() - expected.int()).abs().max()) <= 1


def test_without_guidance_it_has_no_effect(tiny_pipeline: Pipeline) -> None:
    off = OPTIONS.merged({"prior": {"guidance_scale": 1.0}, "decoder": {"guidance_scale": 1.0}})
    led = tiny_pipeline(PROMPTS, [0, 1], negative_prompts=NEGATIVE, options=off)
    plain = tiny_pipeline(PROMPTS, [0, 1], options=off)
    torch.testing.assert_close(led.image_embed, plain.image_embed)
    assert (led.images[16] == plain.images[16]).all()
    assert (
        led.images[16] != tiny_pipeline(PROMPTS, [0, 1], negative_prompts=NEGATIVE, options=OPTIONS).images[16]
    ).any()


def test_each_picture_has_its_own_in_any_batch(tiny_pipeline: Pipeline) -> None:
    together = tiny_pipeline(PROMPTS, [0, 1], negative_prompts=NEGATIVE, options=OPTIONS)
    split = tiny_pipeline(PROMPTS, [0, 1], negative_prompts=NEGATIVE, options=OPTIONS.merged({"max_pixels": 1}))
    alone = tiny_pipeline(PROMPTS[1:], [1], negative_prompts=NEGATIVE[1:], options=OPTIONS)
    for other, rows in ((split, slice(0, 2)), (alone, slice(1, 2))):
        torch.testing.assert_close(other.image_embed, together.image_embed[rows])
        assert abs(other.images[16].astype(int) - together.images[16][rows]).max() <= 1


AUTOREGRESSIVE = {
    "kind": "prior",
    "prior_type": "autoregressive",
    "model": {"embed_dim": 8, "context_length": 16, "width": 16, "depth": 1, "heads": 2, "num_components": 5},
}


def test_at_scale_zero_an_autoregressive_prior_draws_what_the_negative_caption_says(tiny_pipeline: Pipeline) -> None:
    """Code by code as for a prompt of its own, the dot product with its own text among them."""
    config = stage_config_from_dict(AUTOREGRESSIVE)
    network, streams = randomized(config), SampleGenerator.for_samples(0, torch.arange(2))
    told, away = (
        PriorCondition.of_captions(tiny_pipeline.encode_text(texts), tiny_pipeline.tokens(texts, 16))
        for texts in (PROMPTS, NEGATIVE)
    )

    def codes(cond: PriorCondition, scale: float, negative: PriorCondition | None = None) -> torch.Tensor:
        sampling = ARSamplingConfig(guidance_scale=scale, temperature=3.0)
        return draw_codes(network, cond, streams.child("codes"), sampling, negative=negative)

    assert torch.equal(codes(told, 0.0, away), codes(away, 1.0))
    assert not torch.equal(codes(told, 2.0, away), codes(told, 2.0))
    assert torch.equal(codes(told, 1.0, away), codes(told, 1.0))


@pytest.mark.parametrize("count", [1, 3])
def test_there_is_one_for_each_picture(tiny_pipeline: Pipeline, count: int) -> None:
    with pytest.raises(ValueError, match=f"negative_prompts: one for each of 2 seeds is needed, not {count}"):
        tiny_pipeline(PROMPTS, [0, 1], negative_prompts=["a house"] * count)


def test_a_decoder_of_classes_refuses_one(tiny_pipeline: Pipeline) -> None:
    adm = {
        "model": {"embed_dim": None, "text": None, "num_classes": 2},
        "label_column": "kind",
        "classes": ["cat", "dog"],
    }
    config = tiny_pipeline.decoder.config.merged(adm)
    with pytest.raises(ConfigError, match="negative_prompts: the decoder knows classes, and no captions"):
        Pipeline(DecoderStage(config, randomized(config)))(["cat"], [0], negative_prompts=["dog"])
