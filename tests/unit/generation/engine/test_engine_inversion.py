"""Inversions in the engine: rows that go the decoder's timesteps upwards, beside others that go down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.support.engines import MakeEngine, assert_same_pictures, made, run, unit
from tests.support.exact_decoder import exact_decoder

from unclip.config.base import ConfigError
from unclip.generation.engine.config import EngineConfig
from unclip.generation.engine.engine import Engine
from unclip.generation.engine.request import Picture, Request, Update
from unclip.generation.engine.route import Stages
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.inversion import deterministic, invert
from unclip.pipelines.known import KnownPixels
from unclip.pipelines.pipeline import Pipeline
from unclip.pipelines.stages import StageConfig


def options(steps: int, **decoder: object) -> GenerationOptions:
    changes = {"num_inference_steps": steps, "timestep_spacing": "linspace", **decoder}
    return GenerationOptions().merged({"up_to": 16, "decoder": changes})


@pytest.fixture(scope="module")
def drawings() -> np.ndarray:
    """Three pictures uint8 (3, 16, 16, 3) of moderate contrast, in squares."""
    values = np.random.default_rng(0).normal(120, 30, (3, 4, 4, 3)).clip(20, 235).astype(np.uint8)
    return values.repeat(4, axis=1).repeat(4, axis=2)


def beside_others(engine: Engine, requests: list[Request]) -> list[torch.Tensor]:
    """x_T of each, which overlap with each other and with drawings of all samplers."""
    tickets = []
    for number, request in enumerate(requests):
        sampler = ("ddpm", "ddim", "sde-dpmsolver++")[number % 3]
        drawn = options(6, sampler=sampler, eta=1.0 if sampler == "ddim" else None)
        engine.submit(Request(prompt="two dogs", image_embed=unit(number), seed=number, options=drawn))
        tickets.append(engine.submit(request))
        engine.step()
    run(engine)
    found = [ticket.result(0).x_T for ticket in tickets]
    assert all(x_T is not None for x_T in found)
    return found


def test_alone_and_beside_others_x_t_is_that_of_the_pipeline(
    make_engine: MakeEngine, pipeline: Pipeline, drawings: np.ndarray
) -> None:
    asked = [options(5), options(8, guidance_scale=1.0), options(5, guidance_scale=3.0, guidance_interval=(0.2, 0.7))]
    requests, expected = [], []
    for drawing, chosen in zip(drawings, asked, strict=True):
        latents = invert(pipeline, drawing[None], options=chosen)
        requests.append(Request(image_embed=latents.image_embed[0], inverts=drawing, options=chosen))
        expected.append(latents.x_T[0])
    engine = make_engine()
    alone = [made(engine, request) for request in requests]
    for found, together, x_T in zip(alone, beside_others(engine, requests), expected, strict=True):
        assert found.images == {}
        torch.testing.assert_close(found.x_T, x_T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together, x_T, rtol=1e-4, atol=1e-4)
    assert alone[2].settings["sampling"]["decoder"]["eta"] == 0


def test_drawings_beside_an_inversion_are_what_they_are_alone(make_engine: MakeEngine, drawings: np.ndarray) -> None:
    engine = make_engine()
    request = Request(prompt="two dogs", image_embed=unit(1), options=options(5, sampler="ddim", eta=0.5))
    alone = made(engine, request)
    tickets = [
        engine.submit(Request(image_embed=unit(0), inverts=drawings[0], options=options(7))),
        engine.submit(request),
    ]
    run(engine)
    assert_same_pictures(tickets[1].result(0).images, alone.images)


@pytest.fixture(scope="module")
def exact(tiny_configs: Mapping[str, StageConfig]) -> Engine:
    """An engine of a decoder whose network is exact."""
    return Engine(Stages({"decoder": exact_decoder(tiny_configs["decoder"])}), EngineConfig(memory_bytes=2**33))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_pictures_come_back_the_better_the_more_steps(exact: Engine, drawings: np.ndarray, scale: float) -> None:
    errors = []
    for steps in (10, 40, 160):
        chosen, difference = options(steps, guidance_scale=scale), 0.0
        for number, drawing in enumerate(drawings):
            request = Request(image_embed=unit(number), options=chosen)
            x_T = made(exact, replace(request, inverts=drawing)).x_T
            back = made(exact, replace(request, x_T=x_T, options=deterministic(chosen))).images[16]
            difference += float(np.abs(back.astype(int) - drawing).mean()) / len(drawings)
        errors.append(difference)
    assert errors[0] > 2 * errors[1] > 2 * errors[2]
    assert errors[2] < 2


def test_a_caption_is_told_on_the_way_up_as_on_the_way_down(make_engine: MakeEngine, drawings: np.ndarray) -> None:
    """And what guidance leads away from."""
    engine, request = make_engine(), Request(image_embed=unit(0), inverts=drawings[0], options=options(4))
    told = [request, replace(request, prompt="two dogs"), replace(request, negative_prompt="two dogs")]
    found = [made(engine, request).x_T for request in told]
    assert min((found[0] - x_T).abs().max() for x_T in found[1:]) > 1e-2


def test_who_watches_sees_no_picture_in_the_noise(make_engine: MakeEngine, drawings: np.ndarray) -> None:
    seen: list[tuple[int, int, Picture | None]] = []

    def watch(update: Update) -> None:
        seen.append((update.steps, update.total, update.picture()))

    made(make_engine(), Request(image_embed=unit(0), inverts=drawings[0], options=options(3), watch=watch))
    assert [(steps, total) for steps, total, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert [picture is None for _, _, picture in seen] == [False, False, True]


SMALL = np.zeros((16, 16, 3), np.uint8)
NOISE = torch.zeros(3, 16, 16)
KNOWN = {16: KnownPixels(torch.zeros(1, 16, 16, 3, dtype=torch.uint8), torch.ones(1, 16, 16, dtype=torch.bool))}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(inverts=SMALL), "inverts: goes with image_embed, not with none"),
        (Request(inverts=SMALL, image_embed=unit(0), x_T=NOISE), "inverts: goes with image_embed, not with x_T"),
        (Request(inverts=SMALL, image_embed=unit(0), known=KNOWN), "inverts: goes with image_embed, not with known"),
        (Request(inverts=SMALL, image_embed=unit(0), low_res=SMALL), "inverts: goes with image_embed, not with low_res"),
        (Request(inverts=SMALL[:8], image_embed=unit(0)), r"inverts must be uint8 \(16, 16, 3\), not uint8 \(8, 16, 3\)"),
        (Request(inverts=SMALL.astype(np.float32), image_embed=unit(0)), "not float32"),
        (Request(inverts=SMALL, image_embed=torch.ones(8)), "image_embed must be of unit norm"),
        (Request(inverts=SMALL, image_embed=unit(0), stages=("prior",)), "stages = prior: the request goes through dec"),
        (Request(inverts=SMALL, image_embed=unit(0), options=options(4, sampler="ddpm")), "only ddim comes back"),
    ],
)  # fmt: skip
def test_what_cannot_be_inverted_is_refused(make_engine: MakeEngine, request_: Request, message: str) -> None:
    with pytest.raises((ValueError, ConfigError), match=message):
        make_engine().submit(request_)
