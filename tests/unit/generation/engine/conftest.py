"""Engines over tiny stages, and the same pictures made one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
from tests.support.engines import CountedNetwork, MakeEngine
from torch import nn

from unclip.generation.engine.config import EngineConfig
from unclip.generation.engine.engine import Engine
from unclip.generation.engine.route import Stages
from unclip.pipelines.pipeline import Pipeline
from unclip.pipelines.stages import DecoderStage, PriorStage, StageConfig, UpsamplerStage


@pytest.fixture
def networks(tiny_models: Mapping[str, nn.Module]) -> dict[str, CountedNetwork]:
    names = ("prior", "decoder", "upsampler_256", "upsampler_1024")
    return {name: CountedNetwork(tiny_models[name]) for name in names}


@pytest.fixture
def pipeline(
    tiny_configs: Mapping[str, StageConfig], tiny_models: Mapping[str, nn.Module], networks: dict[str, CountedNetwork]
) -> Pipeline:
    """The whole cascade 16 -> 32 -> 64, whose networks are counted."""
    return Pipeline(
        DecoderStage(tiny_configs["decoder"], networks["decoder"]),
        clip=tiny_models["clip"],
        prior=PriorStage(tiny_configs["prior"], networks["prior"]),
        upsamplers={
            name: UpsamplerStage(tiny_configs[name], networks[name]) for name in ("upsampler_256", "upsampler_1024")
        },
    )


@pytest.fixture
def make_engine(pipeline: Pipeline, networks: dict[str, CountedNetwork]) -> MakeEngine:
    """An engine over the cascade with so many slots a stage, before which nothing was computed."""

    def make(rows: int | Mapping[str, int] = 8, *, clock: Callable[[], float] | None = None, **config) -> Engine:
        limits = dict.fromkeys(networks, rows) if isinstance(rows, int) else dict(rows)
        config = EngineConfig.from_dict({"rows": limits, "memory_bytes": 2**33, **config})
        engine = Engine(Stages.of(pipeline), config, **({} if clock is None else {"clock": clock}))
        for network in networks.values():
            network.calls.clear()
            network.prepared.clear()
        return engine

    return make
