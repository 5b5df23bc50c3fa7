"""Compiled networks see few numbers of rows, and make the same pictures."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import pytest
import torch
from tests.support.engines import CountedNetwork, MakeEngine, assert_same_pictures, made, run, unit
from torch import nn

from unclip.generation.engine.config import EngineConfig
from unclip.generation.engine.engine import Engine
from unclip.generation.engine.padding import padded_sizes, padding_to
from unclip.generation.engine.request import Request
from unclip.generation.engine.route import Stages
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.pipeline import Pipeline
from unclip.pipelines.stages import UpsamplerStage


def test_sizes_are_few_and_waste_less_than_half() -> None:
    for most in range(1, 130):
        sizes = padded_sizes(most)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == most
        assert len(sizes) <= 1 + most.bit_length()
        pad = padding_to(sizes)
        for rows in range(1, most + 1):
            assert rows <= pad(rows) < 2 * rows or pad(rows) == rows == 1


def test_padding_never_comes_out(make_engine: MakeEngine, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that are traced and run as they are, so that the whole cascade is padded without a compiler's minutes."""
    requests = [Request(prompt="two dogs", seed=seed) for seed in range(3)]
    expected = [made(make_engine(), request).images for request in requests]
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    engine = make_engine(6, compile=True)
    tickets = [engine.submit(request) for request in requests]
    run(engine)
    for ticket, images in zip(tickets, expected, strict=True):
        assert_same_pictures(ticket.result(0).images, images)
    calls = {name: set(stage.network.calls) for name, stage in Stages.of(pipeline).by_name.items()}
    assert all(sizes <= set(padded_sizes(12)) for sizes in calls.values())
    stages = engine.metrics().stages
    # In both halves, six draws are 12 rows, and three pictures 6 of 8; upsamplers have 3 of 4.
    assert [stages[name].padding_waste for name in stages] == [0.0, 0.25, 0.25, 0.25]


@pytest.mark.parametrize("name", ["decoder", "upsampler_256"])
def test_networks_can_be_traced_with_all_that_they_are_told(
    pipeline: Pipeline, tiny_models: Mapping[str, nn.Module], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whole graphs for every number of rows, without the minutes that it takes to compile them."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    stage = type(pipeline.decoder)(pipeline.decoder.config, tiny_models["decoder"])
    if name != "decoder":
        stage = UpsamplerStage(pipeline.upsamplers["upsampler_256"].config, tiny_models[name])
    pictures = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    options = GenerationOptions.from_dict({"up_to": 16 if name == "decoder" else 32})
    results = []
    for compile_it in (False, True):
        config = EngineConfig.from_dict({"rows": {name: 2}, "memory_bytes": 2**33, "compile": compile_it})
        engine = Engine(Stages({name: stage}, pipeline.clip), config)
        given = [{"image_embed": unit(i)} if name == "decoder" else {"low_res": pictures[i]} for i in range(3)]
        tickets = [engine.submit(Request(options=options, **begins)) for begins in given]
        run(engine)
        results.append([ticket.result(0).images for ticket in tickets])
    for eager, compiled in zip(*results, strict=True):
        assert_same_pictures(compiled, eager)


def test_upsamplers_are_never_guided_and_so_compiled_for_their_slots_alone(
    make_engine: MakeEngine, networks: Mapping[str, CountedNetwork], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    engine = make_engine(3, compile=True)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    for picture in pictures:
        engine.submit(Request(low_res=picture, options=GenerationOptions(up_to=32)))
    run(engine)
    assert set(networks["upsampler_256"].calls) == {3}
