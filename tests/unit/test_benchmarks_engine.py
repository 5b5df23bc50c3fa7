"""The engine's benchmark serves every request on every side, and its sides are what they are called. No time is judged here."""

from __future__ import annotations

import random
import time

import pytest
import torch
from benchmarks.common import parameter_count
from benchmarks.engine.curves import Point, at_equal_p95, rate_at
from benchmarks.engine.diffusers_loop import DiffusersLoop
from benchmarks.engine.load import SIDES, Row, measure, poisson
from benchmarks.engine.sides import Served, SideName, build, serve
from benchmarks.engine.together import together
from tests.support.engines import assert_same_pictures

from unclip.generation.engine.config import EngineConfig
from unclip.generation.engine.request import Request
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.pipeline import Pipeline

CONFIG = EngineConfig(memory_bytes=2**33)


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: str) -> Pipeline:
    return Pipeline.from_bundle(tiny_bundle)


def requests(count: int) -> list[Request]:
    options = GenerationOptions.from_dict({"up_to": 32, "decoder": {"num_inference_steps": 2}})
    return [Request(prompt="two dogs", seed=seed, options=options) for seed in range(count)]


def test_every_side_serves_all(pipeline: Pipeline) -> None:
    sides = {name: build(name, pipeline, CONFIG, size=2, window=0.01) for name in SIDES}
    found = measure(sides, requests(3), 0, loads=[50.0], curve=[1.0])
    assert found["saturated"].keys() == set(SIDES) == found["curves"].keys()
    assert [(row["side"], row["load"]) for row in found["rows"]] == [(name, 50.0) for name in SIDES]
    assert all(0 < row["p50"] <= row["p95"] <= row["p99"] for row in found["rows"])


@pytest.mark.parametrize("name", ["closed", "static", "grouped"])
def test_a_batch_begins_when_it_is_full_or_its_first_has_waited(pipeline: Pipeline, name: SideName) -> None:
    side = build(name, pipeline, CONFIG, size=2, window=60.0)
    first, second, third = requests(3)
    arrived = time.perf_counter() - 20
    side.take(0, first, arrived)
    assert side.resting_until == arrived + 60
    side.take(1, second, arrived + 10)
    assert side.resting_until is None
    done = side.work() if name == "closed" else []
    side.take(2, third, arrived + 30)
    while not done:
        done = side.work()
    assert done == [0, 1]
    assert side.resting_until == arrived + 90


def test_a_static_batch_has_the_pictures_of_its_requests(pipeline: Pipeline) -> None:
    """Steps, samplers and scales differ within it."""
    changes = [
        {"decoder": {"num_inference_steps": 2}, "prior": {"num_inference_steps": 3}},
        {"decoder": {"sampler": "ddim", "num_inference_steps": 5, "guidance_scale": 2.0}},
        {"decoder": {"guidance_scale": 1.0}, "upsampler_256": {"num_inference_steps": 4}},
    ]
    options = [GenerationOptions().merged({"up_to": 32, **change}) for change in changes]
    asked = [Request(prompt=f"{seed} dogs", seed=seed, options=each) for seed, each in enumerate(options)]
    made = together(pipeline, asked)
    for row, request in enumerate(asked):
        alone = pipeline([request.prompt or ""], [request.seed], options=request.options).images
        assert_same_pictures(
            {size: pictures[row].numpy() for size, pictures in made.items()}, {s: p[0] for s, p in alone.items()}
        )


def test_rates_at_equal_p95_lie_between_the_points_of_each_curve() -> None:
    """One side's p95 is 1 + rate, the other's 1 + 2 rate: it serves half as much at every p95 that both have points around."""
    curves = {
        "fast": [Point(rate, 1 + rate) for rate in (0.5, 1.0, 3.0, 4.0)],
        "slow": [Point(rate, 1 + 2 * rate) for rate in (1.0, 1.4, 3.0)],
    }
    levels = at_equal_p95(curves, "fast")
    assert [level.p95 for level in levels] == pytest.approx([3.0, 3.5, 4.0, 4.5, 5.0])
    for level in levels:
        assert (level.first_rate, level.other_rate, level.ratio) == pytest.approx(
            (level.p95 - 1, (level.p95 - 1) / 2, 2)
        )


def test_points_that_chance_put_behind_others_do_not_count() -> None:
    points = [Point(1.0, 1.0), Point(2.0, 3.0), Point(2.5, 2.0), Point(2.4, 4.0), Point(3.5, 4.0)]
    assert rate_at(points, 1.5) == pytest.approx(1.75)
    assert rate_at(points, 3.0) == pytest.approx(3.0)


def test_arrivals_are_a_poisson_process() -> None:
    times = poisson(20_000, 4.0, random.Random(0))
    gaps = torch.tensor(times).diff()
    assert times[0] == 0
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(0.25, rel=0.03)


def test_rows_say_how_many_and_how_long() -> None:
    row = Row.of("engine", 0.5, Served([float(second) for second in range(1, 102)], span=50.5))
    assert (row.images_per_second, row.p50, row.p95, row.p99) == (2.0, 51.0, 96.0, 100.0)


def test_diffusers_networks_have_the_shapes_of_the_bundle(pipeline: Pipeline) -> None:
    """Down to the conditioners, which each has its own of."""
    loop = DiffusersLoop(pipeline)
    ours = pipeline.upsamplers["upsampler_256"].network
    theirs, _ = loop._upsamplers["upsampler_256"]
    assert parameter_count(theirs) == pytest.approx(parameter_count(ours), rel=0.02)
    assert parameter_count(loop._decoder) == pytest.approx(parameter_count(pipeline.decoder.network.unet), rel=0.05)
    assert served_all(loop, pipeline)


def served_all(loop: DiffusersLoop, pipeline: Pipeline) -> bool:
    """Every network is called once for each step."""
    calls = {"prior": 0, "decoder": 0, "upsampler_256": 0}

    def count(name: str):
        def hook(_module, _inputs, _output) -> None:
            calls[name] += 1

        return hook

    loop._prior.register_forward_hook(count("prior"))
    loop._decoder.register_forward_hook(count("decoder"))
    loop._upsamplers["upsampler_256"][0].register_forward_hook(count("upsampler_256"))
    cascade = pipeline.plan(requests(1)[0].options)
    loop(cascade)
    return calls == {name: cascade.sampling[name].num_inference_steps for name in calls}


def test_serving_waits_for_who_has_not_come_yet(pipeline: Pipeline) -> None:
    served = serve(build("engine", pipeline, CONFIG, size=2, window=0.01), requests(2), [0.0, 0.3])
    assert served.span >= 0.3
    assert len(served.seconds) == 2
