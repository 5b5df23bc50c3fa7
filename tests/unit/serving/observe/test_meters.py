"""Meters: what is counted comes out again, and nothing that the catalogue does not know."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from tests.support.bundles import save_tiny_bundle

from unclip.generation.engine.config import EngineConfig
from unclip.generation.engine.engine import Engine
from unclip.generation.engine.request import Request
from unclip.generation.engine.route import Stages
from unclip.pipelines.pipeline import Pipeline
from unclip.serving.observe.meters import CATALOGUE, MemoryMeters, NoMeters, publish, publish_devices
from unclip.serving.observe.timeline import Timeline


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    uri = str(tmp_path_factory.mktemp("bundles") / "tiny")
    save_tiny_bundle(uri)
    return Stages.of(Pipeline.from_bundle(uri))


def drawn(engine: Engine, count: int, **fields) -> None:
    for seed in range(count):
        engine.submit(Request(prompt="a dog", seed=seed, **fields))
    while engine.has_work:
        engine.step()


@pytest.mark.parametrize("meters", [MemoryMeters(), NoMeters()])
def test_only_what_the_catalogue_knows(meters) -> None:
    with pytest.raises(ValueError, match="unclip_serve_steam: no such meter"):
        meters.count("unclip_serve_steam")
    with pytest.raises(ValueError, match="unclip_serve_slots: is a gauge, not a counter"):
        meters.count("unclip_serve_slots", group="all", stage="prior")
    with pytest.raises(ValueError, match="unclip_serve_slots: labels are group, not group, stage"):
        meters.set("unclip_serve_slots", 3, group="all")
    with pytest.raises(ValueError, match="unclip_serve_in_flight: labels are group, not none"):
        meters.set("unclip_serve_in_flight", 3, group="all")
    with pytest.raises(ValueError, match=r"amount = -1: a counter does not fall"):
        meters.count("unclip_serve_refused", -1, reason="overloaded")


def test_catalogue_is_fit_for_prometheus() -> None:
    for name, meter in CATALOGUE.items():
        assert re.fullmatch(r"unclip_serve_[a-z_]+", name)
        assert not name.endswith(("_total", "_count", "_sum", "_bucket")), "suffixes of the exporters"
        assert meter.description
        assert bool(meter.buckets) == (meter.kind == "histogram")
        assert list(meter.buckets) == sorted(set(meter.buckets))


def test_values_are_kept_by_label_and_added_up() -> None:
    meters = MemoryMeters()
    meters.count("unclip_serve_requests", route="/v1/models", status="200")
    meters.count("unclip_serve_requests", 2, status="404", route="/v1/models")
    meters.set("unclip_serve_in_flight", 3)
    meters.set("unclip_serve_in_flight", 2)
    assert meters.value("unclip_serve_requests") == 3
    assert meters.value("unclip_serve_requests", status="404") == 2
    assert meters.value("unclip_serve_requests", route="/v1/files") == 0
    assert meters.value("unclip_serve_in_flight") == 2


def test_seconds_fall_into_buckets_with_their_bound() -> None:
    """As Prometheus has it: a bucket holds what is at most its bound."""
    meters = MemoryMeters()
    for seconds in (0.01, 0.010001, 400.0):
        meters.observe("unclip_serve_request_seconds", seconds, route="/v1/models")
    buckets = meters.buckets("unclip_serve_request_seconds")
    assert (buckets[0], buckets[1], buckets[-1], sum(buckets)) == (1, 1, 1, 3)
    assert meters.observations("unclip_serve_request_seconds", route="/v1/models") == 3
    assert meters.value("unclip_serve_request_seconds") == pytest.approx(400.020001)


def test_totals_count_what_they_have_risen_by() -> None:
    meters = MemoryMeters()
    for total in (5, 5, 8, 2, 3):
        meters.count_to("unclip_serve_steps", total, group="all", stage="prior")
        meters.count_to("unclip_serve_steps", total, group="all", stage="decoder")
    assert meters.value("unclip_serve_steps", stage="prior") == 5 + 0 + 3 + 2 + 1


def test_an_engine_shows_its_rows_steps_and_ends(stages: Stages) -> None:
    engine, meters = Engine(stages, EngineConfig.from_dict({"rows": {"decoder": 2}})), MemoryMeters()
    for seed in range(3):
        engine.submit(Request(prompt="a dog", seed=seed))
    publish(meters, engine.metrics(), "all")
    assert meters.value("unclip_serve_queued_steps", group="all") == engine.metrics().queued_steps > 0
    assert meters.value("unclip_serve_engine_waiting") == 3
    drawn(engine, 0)
    for _ in range(2):
        publish(meters, engine.metrics(), "all")
    assert meters.value("unclip_serve_queued_steps") == 0
    assert meters.value("unclip_serve_engine_requests", end="finished") == 3
    assert meters.value("unclip_serve_engine_requests") == 3
    assert meters.value("unclip_serve_slots", stage="decoder") == 2
    assert meters.value("unclip_serve_rows", stage="decoder") == 3 * 3
    for stage, found in engine.metrics().stages.items():
        assert meters.value("unclip_serve_steps", stage=stage) == found.steps > 0
        assert meters.value("unclip_serve_forward_rows", stage=stage) == found.forward_rows > 0
        assert meters.value("unclip_serve_step_seconds", stage=stage) == pytest.approx(found.step_seconds)


def test_a_new_engine_of_a_group_goes_on_counting(stages: Stages) -> None:
    """As after a change of weights."""
    meters = MemoryMeters()
    for count in (2, 1):
        engine = Engine(stages, EngineConfig())
        drawn(engine, count)
        publish(meters, engine.metrics(), "all")
    assert meters.value("unclip_serve_engine_requests", end="finished") == 3


def test_a_picture_is_timed_in_the_queue_and_in_each_stage(stages: Stages) -> None:
    engine, meters, steps = Engine(stages, EngineConfig()), MemoryMeters(), []
    timeline = Timeline(steps.append)
    ticket = engine.submit(replace(Request(prompt="a dog"), watch=timeline))
    drawn(engine, 0)
    result = ticket.result(0)
    timeline.finish(result, meters, "all")
    assert {update.stage for update in steps} == {"prior", "decoder", "upsampler_256"}
    for stage in ("prior", "decoder", "upsampler_256"):
        assert meters.observations("unclip_serve_stage_seconds", group="all", stage=stage) == 1
    assert meters.value("unclip_serve_queue_seconds", group="all") == result.queue_seconds
    whole = meters.value("unclip_serve_stage_seconds") + meters.value("unclip_serve_queue_seconds")
    assert 0.5 * result.seconds < whole <= 1.01 * result.seconds + 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_of_gpus_is_that_of_the_device() -> None:
    meters = MemoryMeters()
    publish_devices(meters)
    device = str(torch.cuda.get_device_properties(0).uuid)
    total = torch.cuda.get_device_properties(0).total_memory
    assert meters.value("unclip_serve_gpu_total_bytes", device=device) == pytest.approx(total, rel=0.05)
    assert 0 < meters.value("unclip_serve_gpu_used_bytes", device=device) <= total
