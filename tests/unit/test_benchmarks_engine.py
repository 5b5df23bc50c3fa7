"""The engine's benchmark serves every request on every side, and its sides are what they are called. No time is judged here."""

from __future__ import annotations

import random
import time

import pytest
import torch
from benchmarks.common import parameter_count
from benchmarks.engine.diffusers_loop import DiffusersLoop
from benchmarks.engine.load import SIDES, Row, measure, poisson
from benchmarks.engine.sides import Served, build, serve

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
    found = measure(sides, requests(3), [50.0], seed=0)
    assert found["saturated"].keys() == set(SIDES)
    assert [(row["side"], row["load"]) for row in found["rows"]] == [(name, 50.0) for name in SIDES]
    assert all(0 < row["p50"] <= row["p95"] <= row["p99"] for row in found["rows"])


def test_a_static_batch_begins_when_it_is_full_or_its_first_has_waited(pipeline: Pipeline) -> None:
    side = build("static", pipeline, CONFIG, size=2, window=60.0)
    first, second, third = requests(3)
    side.take(0, first)
    rest = side.resting_until
    assert rest is not None
    assert rest > time.perf_counter() + 30
    side.take(1, second)
    assert side.resting_until is None
    assert side.work() == []
    side.take(2, third)
    while not (done := side.work()):
        pass
    assert done == [0, 1]
    assert side.resting_until is not None


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
