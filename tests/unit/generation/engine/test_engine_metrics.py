"""Every request that was submitted is under way or counted in one of the four ends, whatever happens to it and when."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from tests.support.engines import CountedNetwork, MakeEngine, unit

from unclip.generation.engine.engine import Engine
from unclip.generation.engine.request import EngineStoppedError, Request, Ticket, Update
from unclip.pipelines.cascade import GenerationOptions

Networks = dict[str, CountedNetwork]


class Broken(Exception):
    pass


class Trouble:
    """A random history: who comes, who cancels between steps and within them, which steps and watchers fail, and the time."""

    def __init__(self, make_engine: MakeEngine, networks: Networks, seed: int) -> None:
        self.rng, self.now = random.Random(seed), 0.0
        self.engine: Engine = make_engine(self.rng.choice([1, 2, 4]), clock=lambda: self.now)
        self.tickets: list[Ticket] = []
        for network in networks.values():
            network.register_forward_pre_hook(lambda _module, _inputs: self.strike())

    def strike(self) -> None:
        """Within a step."""
        self.cancel_some(0.1)
        if self.rng.random() < 0.1:
            raise Broken("out of luck")

    def cancel_some(self, share: float) -> None:
        if self.tickets and self.rng.random() < share:
            self.rng.choice(self.tickets).cancel()

    def watch(self, update: Update) -> None:
        self.cancel_some(0.05)
        if self.rng.random() < 0.02:
            raise Broken("not looking")

    def submit(self) -> None:
        steps = {"num_inference_steps": self.rng.randint(1, 3)}
        options = GenerationOptions().merged({"up_to": self.rng.choice([16, 32]), "decoder": steps, "prior": steps})
        request = Request(
            prompt="two dogs",
            image_embed=self.rng.choice([None, unit(1)]),
            options=options,
            timeout=self.rng.choice([None, 3.0, 10.0]),
            watch=self.rng.choice([None, self.watch]),
        )
        self.tickets.append(self.engine.submit(request))

    def check(self) -> None:
        metrics = self.engine.metrics()
        ends = {name: getattr(metrics, name) for name in ("finished", "failed", "cancelled", "expired")}
        assert metrics.submitted == len(self.tickets) == metrics.running + metrics.waiting + sum(ends.values())
        for name, number in ends.items():
            assert number <= Counter(ticket.end for ticket in self.tickets if ticket.done())[name]

    def end(self) -> Counter[str]:
        self.engine.step()  # forgets who was cancelled last
        self.check()
        metrics = self.engine.metrics()
        ends = Counter(ticket.end for ticket in self.tickets if ticket.done())
        assert {name: getattr(metrics, name) for name in ends} == ends
        assert (metrics.running, metrics.waiting) == (0, 0)
        return ends


@pytest.mark.parametrize("part", range(3))
def test_counts_add_up_in_every_history(make_engine: MakeEngine, networks: Networks, part: int) -> None:
    seen = Counter[str]()
    for seed in range(4 * part, 4 * part + 4):
        trouble = Trouble(make_engine, networks, seed)
        for _ in range(60):
            if trouble.rng.random() < 0.35:
                trouble.submit()
            trouble.cancel_some(0.05)
            trouble.now += trouble.rng.random()
            trouble.engine.step()
            trouble.check()
        if seed % 2:
            trouble.engine.fail_all(EngineStoppedError("over"))
        while trouble.engine.has_work:
            trouble.engine.step()
            trouble.check()
        seen += trouble.end()
        for network in networks.values():
            network._forward_pre_hooks.clear()
    assert seen.keys() == {"finished", "failed", "cancelled", "expired"}


def test_queued_steps_are_those_that_rows_still_have_to_take(make_engine: MakeEngine) -> None:
    """Of those that run, wait for a slot, or have just been submitted; a row's, where it is."""
    engine = make_engine({"prior": 3, "decoder": 1, "upsampler_256": 1, "upsampler_1024": 1})
    options = GenerationOptions().merged({"up_to": 16, "decoder": {"num_inference_steps": 4}})

    def queued() -> tuple[int, int, int]:
        metrics = engine.metrics()
        return metrics.queued_steps, metrics.stages["prior"].queued_steps, metrics.stages["decoder"].queued_steps

    assert queued() == (0, 0, 0)
    for seed in range(2):
        engine.submit(Request(prompt="two dogs", seed=seed, options=options))  # two draws of three steps
    assert queued() == (12, 12, 0)
    seen = []
    while engine.has_work:
        engine.step()
        seen.append(queued())
    assert seen[:3] == [(9, 9, 0), (6, 6, 0), (7, 3, 4)]  # three slots for four draws; then the first is through
    assert seen[-5:] == [(4, 0, 4), (3, 0, 3), (2, 0, 2), (1, 0, 1), (0, 0, 0)]


def test_an_inversion_counts_its_steps_upwards(make_engine: MakeEngine) -> None:
    engine = make_engine()
    options = GenerationOptions().merged({"decoder": {"num_inference_steps": 7}})
    engine.submit(Request(image_embed=unit(0), inverts=np.zeros((16, 16, 3), np.uint8), options=options))
    assert engine.metrics().queued_steps == 7
    engine.step()
    assert engine.metrics().queued_steps == 6
