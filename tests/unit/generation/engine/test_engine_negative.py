"""Negative prompts in the engine: the pictures of `Pipeline`, beside rows that have none or others."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.support.engines import MakeEngine, assert_same_pictures, made, randomized, run, unit

from unclip.config.base import ConfigError
from unclip.generation.engine.config import EngineConfig
from unclip.generation.engine.engine import Engine
from unclip.generation.engine.request import Request
from unclip.generation.engine.route import Stages
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.pipeline import Pipeline
from unclip.pipelines.stages import DecoderStage, stage_config_from_dict

SMALL = GenerationOptions(up_to=16)
TEXTS = ("two dogs", "a red apple", "", "a house by the sea")


def of_the_pipeline(pipeline: Pipeline, request: Request) -> dict[int, Any]:
    draw, negative = pipeline.draw([request.seed], options=request.options), None
    if request.negative_prompt is not None:
        negative = [request.negative_prompt]
    prompts = None if request.prompt is None else [request.prompt]
    embed = None if request.image_embed is None else request.image_embed[None]
    if embed is None:
        embed = draw.prior(prompts, negative_prompts=negative)
    output = draw.cascade_of(prompts=prompts, negative_prompts=negative, image_embed=embed, known=request.known)
    return {size: pictures[0] for size, pictures in output.images.items()}


def check_against(pipeline: Pipeline, requests: list[Request]) -> None:
    """The requests, which overlap in one engine, against the pipeline's pictures."""
    engine = Engine(Stages.of(pipeline), EngineConfig(memory_bytes=2**33))
    tickets = []
    for request in requests:
        tickets.append(engine.submit(request))
        engine.step()
    run(engine)
    for ticket in tickets:
        assert_same_pictures(ticket.result(0).images, of_the_pipeline(pipeline, ticket.request))


def guided(rng: random.Random) -> dict[str, Any]:
    interval = {"guidance_interval": (0.2, 0.7)} if rng.random() < 0.3 else {}
    return {"num_inference_steps": rng.randint(1, 5), "guidance_scale": rng.choice([0.0, 1.0, 3.0]), **interval}


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_all_kinds_beside_each_other(pipeline: Pipeline, seed: int) -> None:
    rng = random.Random(seed)
    check_against(
        pipeline,
        [
            Request(
                prompt=rng.choice(TEXTS),
                negative_prompt=rng.choice([None, *TEXTS]),
                seed=number,
                image_embed=rng.choice([None, unit(number)]),
                options=SMALL.merged({"prior": guided(rng), "decoder": guided(rng)}),
            )
            for number in range(8)
        ],
    )


def test_an_embedding_alone_is_led_away_from_a_caption(pipeline: Pipeline) -> None:
    check_against(
        pipeline,
        [
            Request(image_embed=unit(1), negative_prompt="two dogs", options=SMALL),
            Request(image_embed=unit(1), options=SMALL),
        ],
    )


STATES = {"model": {"text": None, "text_states": {"context_length": 16, "state_dim": 16, "width": 8}}}
INPAINTING = {"model": {"inpainting": True, "unet": {"in_channels": 7}}}
UNREAD = {"model": {"text": None}}


@pytest.mark.parametrize("changes", [STATES, INPAINTING, UNREAD], ids=["states", "inpainting", "no captions"])
def test_decoders_of_other_kinds(pipeline: Pipeline, changes: dict[str, Any]) -> None:
    config = pipeline.decoder.config.merged(changes)
    pipeline.decoder = DecoderStage(config, randomized(config))
    request = Request(prompt="two dogs", options=SMALL)
    check_against(pipeline, [request, replace(request, negative_prompt="a red apple"), request])


def test_an_autoregressive_prior(pipeline: Pipeline) -> None:
    """Captions with and without a negative one do not share a call, those with others do."""
    config = stage_config_from_dict(
        {
            "kind": "prior",
            "prior_type": "autoregressive",
            "model": {"embed_dim": 8, "context_length": 16, "width": 16, "depth": 1, "heads": 2, "num_components": 5},
            "sampling": {"guidance_scale": 3.0},
        }
    )
    pipeline.prior = config.stage(randomized(config))
    negatives = (None, "a red apple", None, "a house by the sea")
    requests = [
        Request(prompt="two dogs", negative_prompt=negative, seed=seed, options=SMALL)
        for seed, negative in enumerate(negatives)
    ]
    check_against(pipeline, requests)
    engine = Engine(Stages.of(pipeline), EngineConfig(memory_bytes=2**33))
    for request in requests:
        engine.submit(request)
    engine.step()
    assert engine.metrics().stages["prior"].rows == 2


def test_results_say_what_was_led_away_from(make_engine: MakeEngine) -> None:
    engine = make_engine()
    assert made(engine, Request(prompt="a", negative_prompt="b", options=SMALL)).settings["negative_prompt"] == "b"
    assert "negative_prompt" not in made(engine, Request(prompt="a", options=SMALL)).settings


def test_the_empty_caption_is_not_the_same_as_none(make_engine: MakeEngine) -> None:
    engine, request = make_engine(), Request(prompt="two dogs", options=SMALL)
    without, empty = made(engine, request), made(engine, replace(request, negative_prompt=""))
    assert not torch.allclose(without.image_embed, empty.image_embed, atol=1e-3)


def test_a_decoder_of_classes_refuses_one(pipeline: Pipeline) -> None:
    adm = {
        "model": {"embed_dim": None, "text": None, "num_classes": 3},
        "label_column": "kind",
        "classes": ["cat", "dog", "owl"],
    }
    config = pipeline.decoder.config.merged(adm)
    classes = Pipeline(DecoderStage(config, randomized(config)))
    engine = Engine(Stages.of(classes), EngineConfig(memory_bytes=2**33))
    with pytest.raises(ConfigError, match="negative_prompt = 'dog': the decoder knows classes, and no captions"):
        engine.submit(Request(prompt="cat", negative_prompt="dog"))
