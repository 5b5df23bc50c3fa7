"""A request comes out as it would alone, and as `Pipeline` makes it, whatever runs beside it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.engines import MakeEngine, assert_same_pictures, ended, made, randomized, run, unit

from unclip.config.base import ConfigError
from unclip.generation.engine.config import EngineConfig
from unclip.generation.engine.engine import Engine
from unclip.generation.engine.request import Request, StageFailedError, Update
from unclip.generation.engine.route import Stages
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.guides import build_guide
from unclip.pipelines.known import KnownPixels, known_at
from unclip.pipelines.pipeline import Pipeline
from unclip.pipelines.stages import DecoderStage, stage_config_from_dict

PROMPTS = ("a red apple", "two dogs", "", "a house by the sea")


def random_sampling(rng: random.Random) -> dict[str, Any]:
    sampler = rng.choice(["ddpm", "ddim", "dpmsolver++", "sde-dpmsolver++"])
    eta = {"eta": rng.choice([0.0, 0.5, 1.0])} if sampler == "ddim" else {}
    return {"sampler": sampler, "num_inference_steps": rng.randint(1, 6), **eta}


def random_guided(rng: random.Random) -> dict[str, Any]:
    scale = {"guidance_scale": rng.choice([0.0, 1.0, 2.0, 4.0])}
    interval = {"guidance_interval": rng.choice([(0.1, 0.6), (0.5, 1.0)])} if rng.random() < 0.4 else {}
    return random_sampling(rng) | scale | interval


def random_request(rng: random.Random) -> Request:
    options = GenerationOptions.from_dict(
        {
            "up_to": rng.choice([16, 32, 64, None]),
            "prior": random_guided(rng),
            "decoder": random_guided(rng),
            "upsampler_256": random_sampling(rng),
            "upsampler_1024": random_sampling(rng),
        }
    )
    embed = unit(rng.randrange(100)) if rng.random() < 0.25 else None
    x_T = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(rng.randrange(100)))
    return Request(
        prompt=rng.choice(PROMPTS),
        seed=rng.randrange(-5, 5),
        image_embed=embed,
        options=options,
        x_T=x_T if rng.random() < 0.2 else None,
    )


def of_the_pipeline(pipeline: Pipeline, request: Request) -> tuple[torch.Tensor, dict[int, np.ndarray]]:
    draw = pipeline.draw([request.seed], options=request.options)
    embed = draw.prior([request.prompt]) if request.image_embed is None else request.image_embed[None]
    x_T = None if request.x_T is None else request.x_T[None]
    prompts = None if request.prompt is None else [request.prompt]
    output = draw.cascade_of(prompts=prompts, image_embed=embed, x_T=x_T, known=request.known)
    return embed[0], {size: pictures[0] for size, pictures in output.images.items()}


@pytest.mark.parametrize("seed", range(6))
def test_mixed_loads_come_out_as_the_pipeline_makes_them(
    make_engine: MakeEngine, pipeline: Pipeline, seed: int
) -> None:
    """Other samplers, steps, scales, intervals, sizes, beginnings and arrival times beside each."""
    rng = random.Random(seed)
    engine = make_engine(rng.choice([1, 2, 3, 8]))
    waiting, tickets = [random_request(rng) for _ in range(6)], []
    while waiting or engine.has_work:
        while waiting and (rng.random() < 0.3 or not engine.has_work):
            tickets.append(engine.submit(waiting.pop()))
        engine.step()
    for ticket in tickets:
        embed, images = of_the_pipeline(pipeline, ticket.request)
        result = ticket.result(0)
        torch.testing.assert_close(result.image_embed, embed, rtol=1e-4, atol=1e-4)
        assert_same_pictures(result.images, images)
        if ticket.request.image_embed is None:
            assert result.settings == pipeline.plan(ticket.request.options).settings


def test_a_request_may_begin_at_any_picture_and_end_at_any(make_engine: MakeEngine) -> None:
    """Each beginning is what the cascade has at that point, so the rest comes out the same."""
    engine = make_engine()
    whole = made(engine, Request(prompt="two dogs", seed=3))
    assert list(whole.images) == [16, 32, 64]
    from_16 = made(engine, Request(low_res=whole.images[16], seed=3))
    from_32 = made(engine, Request(low_res=whole.images[32], seed=3))
    assert from_16.image_embed is None
    assert_same_pictures(from_16.images, {size: whole.images[size] for size in (32, 64)})
    assert_same_pictures(from_32.images, {64: whole.images[64]})
    until_32 = made(engine, Request(low_res=whole.images[16], seed=3, options=GenerationOptions(up_to=32)))
    assert_same_pictures(until_32.images, {32: whole.images[32]})
    from_embed = made(engine, Request(prompt="two dogs", image_embed=whole.image_embed, seed=3))
    assert_same_pictures(from_embed.images, whole.images)


def test_an_engine_of_upsamplers_alone(make_engine: MakeEngine, pipeline: Pipeline) -> None:
    low_res = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    expected = made(make_engine(), Request(low_res=low_res, seed=5))
    engine = Engine(Stages(dict(pipeline.upsamplers)), EngineConfig(memory_bytes=2**33))
    assert_same_pictures(made(engine, Request(low_res=low_res, seed=5)).images, expected.images)


def test_embeddings_without_a_caption(make_engine: MakeEngine, pipeline: Pipeline) -> None:
    request = Request(image_embed=unit(1), seed=2, options=GenerationOptions(up_to=16))
    _, images = of_the_pipeline(pipeline, request)
    engine = make_engine()
    engine.submit(Request(prompt="two dogs", options=GenerationOptions(up_to=16)))
    assert_same_pictures(made(engine, request).images, images)
    captioned = made(engine, Request(prompt="two dogs", image_embed=unit(1), seed=2, options=request.options))
    assert np.abs(captioned.images[16].astype(int) - images[16].astype(int)).max() > 5


def some_known(seed: int) -> Mapping[int, KnownPixels]:
    random = np.random.default_rng(seed)
    pixels = torch.from_numpy(random.integers(0, 256, (1, 64, 64, 3), dtype=np.uint8))
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, :, : 16 * (1 + seed)] = True
    return known_at(pixels, mask, (16, 32, 64), feather=0.05 * seed)


def test_known_pixels_are_kept_beside_rows_that_have_none(make_engine: MakeEngine, pipeline: Pipeline) -> None:
    engine = make_engine(3)
    requests = [
        Request(prompt="two dogs", seed=0),
        Request(prompt="two dogs", seed=0, known=some_known(0)),
        Request(prompt="a red apple", seed=1, known=some_known(1)),
        Request(prompt="a red apple", seed=1, known={32: some_known(1)[32]}),
    ]
    tickets = [engine.submit(request) for request in requests]
    run(engine)
    for ticket in tickets:
        request, result = ticket.request, ticket.result(0)
        assert_same_pictures(result.images, of_the_pipeline(pipeline, request)[1])
        for size, known in request.known.items():
            kept = known.mask[0].numpy()
            assert np.array_equal(result.images[size][kept], known.pixels[0].numpy()[kept])


# --- other kinds of stages --------------------------------------------------------------------------------------------

TEXT = {"context_length": 12, "width": 16, "depth": 1, "heads": 2}
CLIP_GUIDE = {
    "kind": "noised_clip",
    "model": {"embed_dim": 8, "image_size": 16, "patch_size": 4, "width": 16, "depth": 1, "heads": 2, "text": TEXT},
    "diffusion": {"num_train_timesteps": 50},
}
CLASSIFIER = {
    "kind": "classifier",
    "model": {"encoder": {"channels": 8, "channel_mult": [1, 2], "depth": 1, "head_channels": 8, "image_size": 16}},
    "diffusion": {"num_train_timesteps": 50},
    "label_column": "colour",
    "classes": ["red", "green", "blue"],
}
AUTOREGRESSIVE = {
    "kind": "prior",
    "prior_type": "autoregressive",
    "model": {"embed_dim": 8, "context_length": 16, "width": 16, "depth": 1, "heads": 2, "num_components": 5},
    "sampling": {"guidance_scale": 2.0},
}
ADM = {
    "model": {"embed_dim": None, "text": None, "num_classes": 3},
    "label_column": "kind",
    "classes": ["cat", "dog", "owl"],
}
STATES = {"model": {"text": None, "text_states": {"context_length": 16, "state_dim": 16, "width": 8}}}
INPAINTING = {"model": {"inpainting": True, "unet": {"in_channels": 7}}}


def check_against(pipeline: Pipeline, requests: list[Request]) -> None:
    """The requests, which overlap in one engine, against the pipeline's pictures."""
    engine = Engine(Stages.of(pipeline), EngineConfig(memory_bytes=2**33))
    tickets = []
    for request in requests:
        tickets.append(engine.submit(request))
        engine.step()
    run(engine)
    for ticket in tickets:
        request = ticket.request
        prompted = request.prompt is not None
        assert prompted
        draw = pipeline.draw([request.seed], options=request.options)
        embed = draw.prior([request.prompt]) if pipeline.prior is not None else None
        output = draw.cascade_of(prompts=[request.prompt], image_embed=embed, known=request.known)
        assert_same_pictures(ticket.result(0).images, {size: made[0] for size, made in output.images.items()})


def test_gradient_guides_touch_only_rows_that_ask_for_them(pipeline: Pipeline) -> None:
    """Of different scales and classes, by one guide or by both, beside a row that has none."""
    pipeline.guides = {}
    for config in (stage_config_from_dict(data) for data in (CLIP_GUIDE, CLASSIFIER)):
        pipeline.guides[config.kind] = build_guide(config, randomized(config))
    asked = [
        {},
        {"clip_guidance_scale": 30.0},
        {"clip_guidance_scale": 60.0, "classifier_guidance_scale": 20.0, "class_label": "blue"},
        {"classifier_guidance_scale": 40.0, "class_label": "red", "guidance_scale": 1.0},
    ]
    options = [GenerationOptions().merged({"up_to": 16, "decoder": changes}) for changes in asked]
    check_against(pipeline, [Request(prompt="two dogs", seed=1, options=changes) for changes in options])


@pytest.mark.parametrize("changes", [ADM, STATES, INPAINTING], ids=["adm", "states", "inpainting"])
def test_decoders_of_other_kinds(pipeline: Pipeline, changes: dict[str, Any]) -> None:
    config = pipeline.decoder.config.merged(changes)
    other = Pipeline(
        DecoderStage(config, randomized(config)), clip=pipeline.clip, prior=None if changes is ADM else pipeline.prior
    )
    prompts = ["owl", "cat"] if changes is ADM else ["two dogs", "a red apple"]
    known = {16: some_known(1)[16]} if changes is INPAINTING else {}
    check_against(
        other, [Request(prompt=prompts[0]), Request(prompt=prompts[1], known=known), Request(prompt=prompts[0], seed=4)]
    )


COLD = GenerationOptions(up_to=16)
WARM = COLD.merged({"prior": {"temperature": 2.0}})


@pytest.fixture
def autoregressive(pipeline: Pipeline) -> Pipeline:
    """The pipeline with such a prior."""
    config = stage_config_from_dict(AUTOREGRESSIVE)
    pipeline.prior = config.stage(randomized(config))
    return pipeline


def test_an_autoregressive_prior(autoregressive: Pipeline) -> None:
    """Captions of one sampling share a call; those of another are no less right."""
    asked = (("two dogs", 0, COLD), ("two dogs", 1, WARM), ("a red apple", 0, COLD))
    check_against(autoregressive, [Request(prompt=text, seed=seed, options=options) for text, seed, options in asked])


def test_of_an_autoregressive_prior_only_the_captions_of_a_call_go_on(autoregressive: Pipeline) -> None:
    engine, seen = Engine(Stages.of(autoregressive), EngineConfig(memory_bytes=2**33)), list[int]()

    def watched(number: int, options: GenerationOptions) -> Request:
        return Request(prompt="two dogs", options=options, watch=lambda _: seen.append(number))

    for number, options in enumerate((COLD, WARM, COLD)):
        engine.submit(watched(number, options))
    engine.step()
    assert (seen, engine.metrics().stages["prior"].rows) == ([0, 2], 2)


def test_an_error_of_an_autoregressive_prior_ends_the_captions_of_that_call(autoregressive: Pipeline) -> None:
    engine = Engine(Stages.of(autoregressive), EngineConfig(memory_bytes=2**33))
    assert autoregressive.prior is not None
    generate, model = autoregressive.prior.network.generate, autoregressive.prior.network

    def breaks_once(*_arguments, **_further) -> torch.Tensor:
        model.generate = generate
        raise ValueError("out of luck")

    model.generate = breaks_once
    tickets = [engine.submit(Request(prompt="two dogs", options=options)) for options in (COLD, WARM, COLD)]
    run(engine)
    assert ended(tickets) == [StageFailedError, None, StageFailedError]


# --- what is refused, what is shown -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(), "prompt, image_embed, low_res: none is given"),
        (Request(prompt="x" * 3000), "prompt has 3000 characters; at most 2000"),
        (Request(prompt="a", seed=2**63), "seed 9223372036854775808: must fit into 64 bits"),
        (Request(prompt="a", timeout=0.0), r"timeout = 0.0: must be above 0"),
        (Request(prompt="a", image_embed=torch.ones(8)), "image_embed must be of unit norm"),
        (Request(prompt="a", image_embed=torch.full((8,), torch.nan)), "image_embed must be of unit norm"),
        (Request(prompt="a", image_embed=torch.ones(1)), r"image_embed must be \(8,\), not \(1,\)"),
        (Request(low_res=np.zeros((8, 8, 3), np.uint8)), "low_res is 8 x 8: no upsampler takes it"),
        (Request(low_res=np.zeros((16, 8, 3), np.uint8)), "low_res is 16 x 8: no upsampler takes it"),
        (Request(low_res=np.zeros((16, 16, 3), np.float32)), r"low_res must be uint8 \(s, s, 3\), not float32"),
        (Request(image_embed=unit(0), low_res=np.zeros((16, 16, 3), np.uint8)), "image_embed and low_res: give one"),
        (Request(prompt="a", x_T=torch.zeros(3, 8, 8)), r"x_T must be \(3, 16, 16\), not \(3, 8, 8\)"),
        (Request(low_res=np.zeros((16, 16, 3), np.uint8), x_T=torch.zeros(3, 16, 16)), "begins behind the decoder"),
        (Request(prompt="a", x_T=torch.full((3, 16, 16), torch.inf)), "x_T must be of finite floating point numbers"),
        (Request(prompt="a", x_T=torch.zeros(3, 16, 16, dtype=torch.int64)), "x_T must be of finite floating point"),
        (Request(prompt="a", known={16: replace(some_known(0)[16], feather=17)}), r"known\[16\]: feather = 17 must be"),
        (Request(prompt="a", known={16: replace(some_known(0)[16], feather=-1)}), r"known\[16\]: feather = -1 must be"),
        (Request(prompt="a", known={8: some_known(0)[16]}), "known: no stage of this request makes pictures of 8"),
        (Request(prompt="a", known={32: some_known(0)[16]}), r"known\[32\]: mask must be \(1, 32, 32\)"),
        (Request(prompt="a", options=GenerationOptions(up_to=17)), "options.up_to = 17"),
    ],
)  # fmt: skip
def test_what_no_stage_could_do_is_refused_at_once(make_engine: MakeEngine, request_: Request, message: str) -> None:
    engine = make_engine()
    with pytest.raises((ValueError, ConfigError), match=message):
        engine.submit(request_)
    assert not engine.has_work


def test_who_watches_sees_every_step_and_the_picture_come_about(make_engine: MakeEngine) -> None:
    seen: list[tuple[str, int, int, np.ndarray | None]] = []

    def watch(update: Update) -> None:
        seen.append((update.stage, update.steps, update.total, update.picture()))

    engine = make_engine()
    engine.submit(Request(prompt="a house by the sea"))
    result = made(engine, Request(prompt="two dogs", watch=watch, options=GenerationOptions(up_to=32)))
    steps = [(stage, done, total) for stage, done, total, _ in seen]
    prior = [("prior", done, 6) for done in (2, 2, 4, 4, 6, 6)]  # both draws go on together
    assert steps == [*prior, *(("decoder", n, 3) for n in (1, 2, 3)), *(("upsampler_256", n, 2) for n in (1, 2))]
    assert all(picture is None for stage, _, _, picture in seen if stage == "prior")
    assert [picture.shape[0] for stage, _, _, picture in seen if stage != "prior"] == [16, 16, 16, 32, 32]
    assert np.array_equal(seen[8][3], result.images[16])
    assert np.array_equal(seen[10][3], result.images[32])
    assert not np.array_equal(seen[6][3], result.images[16])
