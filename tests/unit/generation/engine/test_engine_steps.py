"""Who takes part in which step: what is computed and how often, whose turn it is, and what one request's end does to others."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from tests.support.engines import CountedNetwork, MakeEngine, assert_same_pictures, ended, made, run, unit
from torch.nn import functional

from unclip.generation.engine.engine import Engine
from unclip.generation.engine.request import DeadlineError, Request, StageFailedError, Ticket, Update
from unclip.models.clip import ClipModel
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.pipeline import Pipeline

Networks = dict[str, CountedNetwork]
STAGES = 4


def drawn(steps: int, seed: int = 0, scale: float = 1.0, **further) -> Request:
    """A picture of the decoder alone."""
    changes = {"num_inference_steps": steps, "guidance_scale": scale, **further.pop("decoder", {})}
    options = GenerationOptions().merged({"up_to": 16, "decoder": changes})
    return Request(prompt="two dogs", image_embed=unit(seed), seed=seed, options=options, **further)


# --- what is computed -------------------------------------------------------------------------------------------------


def test_requests_join_and_leave_between_steps_and_share_each_of_them(
    make_engine: MakeEngine, networks: Networks
) -> None:
    engine = make_engine()
    engine.submit(drawn(4))
    engine.step()
    engine.submit(drawn(1))
    engine.submit(drawn(2))
    run(engine)
    assert networks["decoder"].calls == [1, 3, 2, 1]


def test_the_unconditional_half_is_computed_where_it_is_asked_for_alone(
    make_engine: MakeEngine, networks: Networks
) -> None:
    """Of 50 timesteps in 5 steps (49, 37, 25, 12, 0), those from 10 to 30 are guided."""
    engine = make_engine()
    for request in (
        drawn(5),
        drawn(5, scale=3.0),
        drawn(5, scale=2.0, decoder={"guidance_interval": (0.2, 0.6)}),
    ):
        engine.submit(request)
    run(engine)
    assert networks["decoder"].calls == [4, 4, 5, 5, 4]
    assert networks["decoder"].prepared == [5]


def test_a_prompt_is_encoded_once_and_its_pictures_and_draws_share_the_steps(
    make_engine: MakeEngine, networks: Networks, pipeline: Pipeline
) -> None:
    clip, encoded = pipeline.clip, []
    assert isinstance(clip, ClipModel)
    engine = make_engine()
    hook = clip._final_norm.register_forward_hook(lambda _module, _inputs, output: encoded.append(len(output)))
    options = GenerationOptions(up_to=16)
    tickets = [
        engine.submit(Request(prompt=prompt, seed=seed, options=options))
        for prompt in ("two dogs", "a red apple")
        for seed in range(2)
    ]
    run(engine)
    assert encoded == [2]
    hook.remove()
    # Two draws of each of four pictures, in both halves.
    assert networks["prior"].calls == [16] * 3
    assert networks["prior"].prepared == [16]
    assert networks["decoder"].calls == [8] * 3
    assert ended(tickets) == [None] * 4


def test_stages_overlap(make_engine: MakeEngine, networks: Networks) -> None:
    """While the first request is in the decoder, the second is in the prior: each round has a step of both."""
    engine = make_engine()
    engine.submit(Request(prompt="two dogs", options=GenerationOptions(up_to=16)))
    for _ in range(3):
        engine.step()
    engine.submit(Request(prompt="two dogs", options=GenerationOptions(up_to=16)))
    before = engine.metrics().stages
    for _ in range(4):
        engine.step()
    after = engine.metrics().stages
    assert {name: after[name].steps - before[name].steps for name in ("prior", "decoder")} == {"prior": 2, "decoder": 2}


# --- whose turn it is -------------------------------------------------------------------------------------------------


def begun_after(engine: Engine, ticket: Ticket, flood, most: int) -> int:
    """Engine steps up to the request's first, while `flood` submits before each of them."""
    for step in range(most):
        flood()
        engine.step()
        if ticket.begun.is_set():
            return step
    raise AssertionError(f"not begun after {most} steps")


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_nobody_waits_longer_than_the_bound(make_engine: MakeEngine, slots: int, ahead: int) -> None:
    """ceil((p + 1) / S) * K rounds of a step for each stage, while others flood every stage."""
    rng, longest = random.Random(ahead), 5
    engine = make_engine({"prior": 2, "decoder": slots, "upsampler_256": 1, "upsampler_1024": 1})
    picture = made(engine, drawn(1)).images[16]

    def flood() -> None:
        engine.submit(drawn(1))
        engine.submit(Request(low_res=picture))
        engine.submit(Request(prompt="two dogs"))

    for _ in range(slots):
        engine.submit(drawn(longest))
    engine.step()
    for _ in range(ahead):
        engine.submit(drawn(rng.randint(1, longest)))
    victim = engine.submit(drawn(1))
    bound = math.ceil((ahead + 1) / slots) * longest * STAGES
    assert begun_after(engine, victim, flood, bound + STAGES) <= bound + STAGES - 1


def test_every_running_row_goes_on_in_every_round(make_engine: MakeEngine) -> None:
    """Long requests at each stage, and short ones arriving all the time: nobody stands still for longer than a round."""
    engine, taken, steps = make_engine(2), 0, dict[int, list[int]]()
    picture = made(engine, drawn(1)).images[16]

    def watcher(name: int):
        steps[name] = []
        return lambda update: steps[name].append(taken)

    options = GenerationOptions().merged(
        {"up_to": 32, "prior": {"num_inference_steps": 12}, "upsampler_256": {"num_inference_steps": 12}}
    )
    embed = functional.normalize(torch.ones(8), dim=0)
    engine.submit(Request(prompt="two dogs", options=options, watch=watcher(0)))
    engine.submit(drawn(12, watch=watcher(1)))
    engine.submit(Request(low_res=picture, options=options, watch=watcher(2)))
    while taken < 60:
        engine.submit(drawn(1))
        engine.submit(Request(low_res=picture, options=GenerationOptions(up_to=32)))
        engine.submit(Request(image_embed=embed))
        engine.step()
        taken += 1
    # Of the first one the two draws in the prior, each of which is shown.
    for seen in (sorted(set(steps[0]))[:12], steps[1], steps[2]):
        assert len(seen) == 12
        assert max(later - earlier for earlier, later in itertools.pairwise(seen)) <= STAGES


def test_who_came_first_is_first(make_engine: MakeEngine) -> None:
    engine, order = make_engine(2), []
    tickets = [engine.submit(drawn(1 + seed % 3, seed)) for seed in range(9)]
    while engine.has_work:
        engine.step()
        order += [ticket for ticket in tickets if ticket.begun.is_set() and ticket not in order]
    assert order == tickets


# --- ends -------------------------------------------------------------------------------------------------------------


def test_a_cancelled_request_takes_no_further_step_and_its_slot_is_free_at_once(
    make_engine: MakeEngine, networks: Networks
) -> None:
    engine = make_engine(2)
    tickets = [engine.submit(drawn(6, seed)) for seed in range(3)]
    for _ in range(2):
        engine.step()
    assert not tickets[2].begun.is_set()
    assert tickets[0].cancel()
    engine.step()
    assert tickets[2].begun.is_set()
    tickets[1].cancel()
    tickets[2].cancel()
    calls = len(networks["decoder"].calls)
    run(engine)
    assert networks["decoder"].calls == [2] * calls
    metrics = engine.metrics()
    assert (metrics.cancelled, metrics.finished, metrics.stages["decoder"].running) == (3, 0, 0)


def test_a_cancelled_picture_takes_both_draws_along(make_engine: MakeEngine, networks: Networks) -> None:
    engine = make_engine()
    tickets = [engine.submit(Request(prompt="two dogs", seed=seed)) for seed in range(2)]
    engine.step()
    tickets[0].cancel()
    engine.step()
    assert networks["prior"].calls == [8, 4]
    run(engine)
    assert tickets[1].result(0).images.keys() == {16, 32, 64}


def test_a_request_ends_at_its_deadline(make_engine: MakeEngine, networks: Networks) -> None:
    now = [100.0]
    engine = make_engine(1, clock=lambda: now[0])
    tickets = [engine.submit(drawn(4, timeout=10.0)), engine.submit(drawn(2, timeout=5.0)), engine.submit(drawn(2))]
    engine.step()
    now[0] += 6
    engine.step()
    assert isinstance(tickets[1].exception(0), DeadlineError)
    now[0] += 5
    engine.step()
    assert isinstance(tickets[0].exception(0), DeadlineError)
    assert networks["decoder"].calls == [1, 1, 1]
    run(engine)
    result = tickets[2].result(0)
    assert (result.queue_seconds, result.seconds) == (11, 11)
    metrics = engine.metrics()
    assert (metrics.submitted, metrics.expired, metrics.finished) == (3, 2, 1)


class Broken(Exception):
    pass


def breaks_at(network: CountedNetwork, call: int):
    """Raises in the network's call of this number, counted from now."""
    at = len(network.calls) + call

    def check(_module, _inputs) -> None:
        if len(network.calls) + 1 == at:
            network.calls.append(0)
            raise Broken("out of luck")

    return network.register_forward_pre_hook(check)


def test_an_error_of_a_step_ends_its_batch_and_nothing_else(make_engine: MakeEngine, networks: Networks) -> None:
    expected = made(make_engine(), drawn(3, 7)).images
    engine = make_engine(2)
    breaks_at(networks["decoder"], 2)
    in_prior = engine.submit(Request(prompt="two dogs", options=GenerationOptions(up_to=16)))
    hit = [engine.submit(drawn(3, seed)) for seed in range(2)]
    waiting = engine.submit(drawn(3, 7))
    run(engine)
    assert ended(hit) == [StageFailedError] * 2
    failure = hit[0].exception(0)
    assert str(failure) == "stage decoder failed: out of luck"
    assert isinstance(failure.__cause__, Broken)
    assert_same_pictures(waiting.result(0).images, expected)
    assert in_prior.result(0).images.keys() == {16}
    assert engine.metrics().failed == 2


def test_what_is_not_finite_ends_its_row_alone(make_engine: MakeEngine, networks: Networks) -> None:
    """NaN would come out as a black picture; the picture that is being drawn goes on."""
    engine = make_engine()
    running = engine.submit(drawn(12))
    hook = networks["prior"].register_forward_hook(lambda _module, _inputs, output: output * torch.nan)
    doomed = engine.submit(Request(prompt="two dogs"))
    run(engine)
    hook.remove()
    assert str(doomed.exception(0)) == "stage prior failed: its output is not finite"
    assert_same_pictures(running.result(0).images, made(engine, drawn(12)).images)
    hook = networks["decoder"].register_forward_hook(lambda _module, _inputs, output: output * torch.nan)
    black = engine.submit(drawn(3))
    run(engine)
    hook.remove()
    assert str(black.exception(0)) == "stage decoder failed: its output is not finite"


def test_what_a_watcher_raises_ends_its_request_alone(make_engine: MakeEngine) -> None:
    def watch(update: Update) -> None:
        if update.steps == 2:
            raise Broken("not looking")

    engine = make_engine()
    tickets = [engine.submit(drawn(3, watch=watch)), engine.submit(drawn(3))]
    run(engine)
    assert ended(tickets) == [Broken, None]


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_count_what_happened(make_engine: MakeEngine, networks: Networks) -> None:
    now = [0.0]
    engine = make_engine({"prior": 8, "decoder": 2, "upsampler_256": 8, "upsampler_1024": 8}, clock=lambda: now[0])

    def tick(_module, _inputs, _output) -> None:
        now[0] += 0.5

    networks["decoder"].register_forward_hook(tick)
    for steps, scale in ((2, 2.0), (1, 1.0), (1, 1.0)):
        engine.submit(drawn(steps, scale=scale))
    assert engine.metrics().waiting == 3
    engine.step()
    stage = engine.metrics().stages["decoder"]
    assert (stage.running, stage.waiting, stage.slots) == (1, 1, 2)
    run(engine)
    metrics = engine.metrics()
    stage = metrics.stages["decoder"]
    assert (stage.steps, stage.rows, stage.forward_rows, stage.padding_rows, stage.admitted) == (2, 4, 6, 0, 3)
    assert (stage.step_seconds, stage.steps_per_second, stage.rows_per_second) == (1.0, 2.0, 4.0)
    assert (stage.occupancy, stage.padding_waste, stage.wait_seconds) == (1.0, 0.0, 0.5)
    assert (metrics.submitted, metrics.finished, metrics.waiting, metrics.running) == (3, 3, 0, 0)
    assert metrics.queue_seconds == 0.5
    assert engine.metrics().stages["prior"].occupancy == 0
