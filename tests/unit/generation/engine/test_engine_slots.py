"""Slots follow from measured bytes; the batches that they allow stay within them."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.support.engines import CountedNetwork, MakeEngine, run
from tests.support.engines import unit as unit_vector

from unclip.generation.engine.captions import Captions
from unclip.generation.engine.config import EngineConfig
from unclip.generation.engine.engine import Engine
from unclip.generation.engine.probe import measured_memory
from unclip.generation.engine.request import EngineError, Request, Ticket
from unclip.generation.engine.route import Stages
from unclip.generation.engine.slots import StageMemory, divide, total_bytes
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.known import KnownPixels
from unclip.pipelines.pipeline import Pipeline
from unclip.utils.memory import memory_of

Networks = dict[str, CountedNetwork]
CPU = torch.device("cpu")
MEMORY = {
    "prior": StageMemory(fixed=100, row=10, kept=4),
    "decoder": StageMemory(fixed=50, row=200, kept=20),
    "upsampler_256": StageMemory(fixed=0, row=700, kept=30),
}


@pytest.mark.parametrize("budget", [760, 1000, 2500, 10_000])
def test_no_stage_could_have_more_within_the_budget_and_its_share(budget: int) -> None:
    """Against all ways of giving every stage the same room for its step."""
    limits = {"prior": 40, "decoder": 8, "upsampler_256": 4}
    slots = divide(MEMORY, limits, budget)
    assert total_bytes(MEMORY, slots) <= budget
    best = None
    for room in range(budget + 1):
        rows = {name: max(1, min(limits[name], memory.rows(room))) for name, memory in MEMORY.items()}
        best = rows if total_bytes(MEMORY, rows) <= budget else best
    assert slots == best


def test_limits_hold_where_memory_does_not_matter() -> None:
    limits = {"prior": 3, "decoder": 2, "upsampler_256": 1}
    assert divide(MEMORY, limits, 10**9) == limits
    assert divide({"prior": StageMemory(5, 0, 0)}, {"prior": 3}, 5) == {"prior": 3}


def test_a_picture_that_does_not_fit_is_refused_with_the_figures(pipeline: Pipeline) -> None:
    with pytest.raises(EngineError, match=r"a step of prior \d+, decoder \d+, .* but the engine may take 1 MiB"):
        Engine(Stages.of(pipeline), EngineConfig(memory_bytes=2**20))


@pytest.mark.parametrize(
    ("name", "edit"),
    [("prior", False), ("decoder", False), ("decoder", True), ("upsampler_256", False), ("upsampler_256", True)],
)
def test_steps_take_what_the_measure_says(make_engine: MakeEngine, pipeline: Pipeline, name: str, edit: bool) -> None:
    """Full batches of as many rows as fit the measured bytes of a step, at every step of them, with known pixels or not."""
    stages = Stages.of(pipeline)
    memory = measured_memory(name, stages, Captions(stages))
    assert memory.row > memory.kept > 0
    rows = 6
    engine = make_engine(rows)
    options = GenerationOptions.from_dict(
        {"up_to": 32, "prior": {"guidance_scale": 3.0}, "upsampler_256": {"num_inference_steps": 4}}
    )
    picture = torch.zeros(16, 16, 3, dtype=torch.uint8).numpy()

    def submit(seed: int) -> Ticket:
        given = {"prior": {}, "decoder": {"image_embed": unit_vector(seed)}, "upsampler_256": {"low_res": picture}}
        known = {16 if name == "decoder" else 32: all_known(16 if name == "decoder" else 32)} if edit else {}
        texts = {"prompt": f"dog {seed}", "negative_prompt": f"cat {seed}"}
        return engine.submit(Request(**texts, seed=seed, options=options, known=known, **given[name]))

    engine._captions.encode((f"{animal} {seed}", None) for seed in range(rows + 1) for animal in ("dog", "cat"))
    tickets = [submit(seed) for seed in range(rows // (2 if name == "prior" else 1))]

    def come_and_go() -> None:
        """All rows, then others in place of some, so that the old batch and the new one are there together."""
        engine.step()
        tickets[0].cancel()
        submit(rows)
        engine.step()

    peak, left = memory_of(come_and_go, CPU)
    assert engine.metrics().stages[name].running == rows
    assert 0.4 * memory.step(rows) < peak <= memory.step(rows)
    assert left <= 1.1 * rows * memory.kept
    run(engine)


def all_known(size: int) -> KnownPixels:
    return KnownPixels(torch.zeros(1, size, size, 3, dtype=torch.uint8), torch.ones(1, size, size, dtype=torch.bool))


def test_what_libraries_take_on_their_first_call_is_no_rows(pipeline: Pipeline, networks: Networks) -> None:
    """A workspace that comes with the first call and stays, as those of matrix products on GPUs do."""
    stages = Stages.of(pipeline)
    expected, workspaces = measured_memory("decoder", stages, Captions(stages)), []

    def allocate(_module, _inputs) -> None:
        if not workspaces:
            workspaces.append(torch.zeros(2**24, dtype=torch.uint8))

    networks["decoder"].register_forward_pre_hook(allocate)
    assert measured_memory("decoder", stages, Captions(stages)) == expected
    assert workspaces


def test_a_smaller_budget_makes_smaller_batches_of_the_same_pictures(pipeline: Pipeline) -> None:
    stages = Stages.of(pipeline)
    captions = Captions(stages)
    memory = {name: measured_memory(name, stages, captions) for name in stages.by_name}
    least = total_bytes(memory, dict.fromkeys(memory, 1))
    counts = [Engine(stages, EngineConfig(memory_bytes=int(factor * least))).slots for factor in (1.01, 3, 9)]
    assert counts[0]["upsampler_1024"] == 1
    for fewer, more in itertools.pairwise(counts):
        assert all(fewer[name] <= more[name] for name in fewer)
        assert sum(fewer.values()) < sum(more.values())
