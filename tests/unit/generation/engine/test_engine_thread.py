"""The thread around an engine: whoever asks gets an answer, whatever happens to it."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed, wait
from types import FrameType
from typing import Any

import pytest
from tests.support.engines import MakeEngine, assert_same_pictures, made, unit

from unclip.generation.engine.request import EngineFullError, EngineStoppedError, Request, Update
from unclip.generation.engine.worker import EngineThread
from unclip.pipelines.cascade import GenerationOptions

SOON = 60.0


def drawn(seed: int, steps: int = 2, **further) -> Request:
    options = GenerationOptions().merged({"up_to": 16, "decoder": {"num_inference_steps": steps}})
    return Request(image_embed=unit(seed), seed=seed, options=options, **further)


class Gate:
    """A watcher that holds the engine at a step of its request until it is opened."""

    def __init__(self, step: int = 1) -> None:
        self.step = step
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, update: Update) -> None:
        if update.steps >= self.step:
            self.reached.set()
            assert self.open.wait(SOON)


@pytest.fixture
def worker(make_engine: MakeEngine) -> Iterator[EngineThread]:
    with EngineThread(make_engine(4), max_waiting=3) as running:
        yield running


def test_no_request_of_many_threads_is_lost(make_engine: MakeEngine) -> None:
    alone = make_engine()
    expected = [made(alone, drawn(seed, 1 + seed % 3)).images for seed in range(6)]
    with EngineThread(make_engine(4), max_waiting=3) as worker, ThreadPoolExecutor(8) as threads:

        def ask(number: int):
            return worker.submit(drawn(number % 6, 1 + number % 3), patience=SOON).result(SOON)

        results = list(threads.map(ask, range(48)))
    for number, result in enumerate(results):
        assert_same_pictures(result.images, expected[number % 6])
    assert worker.metrics().finished == 48


def test_more_than_may_wait_are_refused_until_there_is_room(worker: EngineThread) -> None:
    gate = Gate()
    first = worker.submit(drawn(0, watch=gate))
    assert gate.reached.wait(SOON)
    waiting = [worker.submit(drawn(seed)) for seed in range(3)]
    with pytest.raises(EngineFullError, match="3 requests wait already"):
        worker.submit(drawn(9))
    with pytest.raises(EngineFullError):
        worker.submit(drawn(9), patience=0.01)
    assert worker.step_seconds > 0
    with ThreadPoolExecutor(1) as threads:
        patient = threads.submit(worker.submit, drawn(9), patience=SOON)
        gate.open.set()
        tickets = [first, *waiting, patient.result(SOON)]
    assert all(ticket.result(SOON) for ticket in tickets)


def test_who_waits_behind_a_later_stage_waits_too(make_engine: MakeEngine) -> None:
    """The prior could take on more, but its captions would pile up in front of the decoder."""
    rows = {"prior": 8, "decoder": 1, "upsampler_256": 1, "upsampler_1024": 1}
    first, then = Gate(), Gate(step=20)

    def watch(update: Update) -> None:
        first(update)
        then(update)

    with EngineThread(make_engine(rows), max_waiting=3) as worker:
        slow = worker.submit(drawn(0, 40, watch=watch))
        assert first.reached.wait(SOON)
        options = GenerationOptions(up_to=16)
        tickets = [worker.submit(Request(prompt="two dogs", seed=seed, options=options)) for seed in range(3)]
        first.open.set()
        assert then.reached.wait(SOON)
        assert all(ticket.begun.is_set() for ticket in tickets)
        with pytest.raises(EngineFullError, match="3 requests wait already"):
            worker.submit(drawn(1))
        then.open.set()
        assert all(ticket.result(SOON) for ticket in (slow, *tickets))


def test_a_bad_request_is_refused_where_it_is_made(worker: EngineThread) -> None:
    with pytest.raises(ValueError, match="none is given"):
        worker.submit(Request())
    assert worker.submit(drawn(0)).result(SOON)


def test_closing_ends_what_is_under_way_with_a_reason(make_engine: MakeEngine) -> None:
    gate = Gate()
    worker = EngineThread(make_engine(1))
    tickets = [worker.submit(drawn(0, 50, watch=gate)), worker.submit(drawn(1, 50))]
    assert gate.reached.wait(SOON)
    closing = threading.Thread(target=worker.close)
    closing.start()
    gate.open.set()
    closing.join(SOON)
    for ticket in tickets:
        with pytest.raises(EngineStoppedError, match="the engine was closed"):
            ticket.result(SOON)
    with pytest.raises(EngineStoppedError):
        worker.submit(drawn(2))
    assert not worker.is_alive


def test_closing_with_patience_finishes_what_was_asked_for(make_engine: MakeEngine) -> None:
    worker = EngineThread(make_engine(1))
    tickets = [worker.submit(drawn(seed, 3)) for seed in range(3)]
    worker.close(patience=SOON)
    assert all(ticket.result(0) for ticket in tickets)


def test_a_dead_thread_fails_everybody_and_says_why(make_engine: MakeEngine) -> None:
    def die(update: Update) -> None:
        raise SystemExit("no way on")

    worker = EngineThread(make_engine(1))
    gate = Gate()
    tickets = [worker.submit(drawn(0, 1, watch=gate))]
    assert gate.reached.wait(SOON)
    tickets += [worker.submit(drawn(1, watch=die)), *(worker.submit(drawn(seed)) for seed in range(3))]
    gate.open.set()
    assert tickets[0].result(SOON)
    for ticket in tickets[1:]:
        failure = ticket.exception(SOON)
        assert isinstance(failure, EngineStoppedError)
        assert isinstance(failure.__cause__, SystemExit)
    assert not worker.is_alive
    with pytest.raises(EngineStoppedError, match="no way on"):
        worker.submit(drawn(1))
    worker.close()
    assert worker.step_seconds == 0


def test_a_device_that_hangs_keeps_nobody_from_closing(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unclip.generation.engine.worker._LAST_STEP_SECONDS", 0.05)
    worker, gate = EngineThread(make_engine(1)), Gate()
    tickets = [worker.submit(drawn(0, 50, watch=gate)), worker.submit(drawn(1))]
    assert gate.reached.wait(SOON)
    late = worker.submit(drawn(2))
    worker.close()
    assert worker.step_seconds > 0.05
    for ticket in (*tickets, late):
        assert ticket.begun.is_set()
        with pytest.raises(EngineStoppedError, match="the engine was closed"):
            ticket.result(0)
    gate.open.set()
    worker.close()
    while worker.step_seconds:
        threading.Event().wait(0.001)
    assert worker.metrics().failed == 3


def test_callbacks_that_raise_keep_no_other_ticket_from_its_end(make_engine: MakeEngine) -> None:
    engine = make_engine()
    tickets = [engine.submit(drawn(seed)) for seed in range(3)]

    def raises(_ticket) -> None:
        raise SystemExit

    tickets[0].add_done_callback(raises)
    engine.fail_all(EngineStoppedError("over"))
    assert all(isinstance(ticket.exception(0), EngineStoppedError) for ticket in tickets)
    assert not engine.has_work


def test_tickets_can_be_awaited_and_cancelled_from_an_event_loop(worker: EngineThread) -> None:
    async def ask() -> None:
        assert (await asyncio.wait_for(asyncio.wrap_future(worker.submit(drawn(0))), SOON)).images
        gate = Gate()
        ticket = worker.submit(drawn(1, 50, watch=gate))
        waiting = asyncio.ensure_future(asyncio.wrap_future(ticket))
        await asyncio.to_thread(gate.reached.wait, SOON)
        waiting.cancel()
        await asyncio.sleep(0)
        gate.open.set()
        with pytest.raises((asyncio.CancelledError, CancelledError)):
            await waiting
        assert ticket.cancelled()

    asyncio.run(ask())
    assert worker.submit(drawn(2)).result(SOON)
    assert worker.metrics().cancelled == 1


def test_who_waits_for_several_tickets_hears_of_those_that_are_cancelled(worker: EngineThread) -> None:
    gate = Gate()
    tickets = [worker.submit(drawn(0, 50, watch=gate)), worker.submit(drawn(1, 50))]
    assert gate.reached.wait(SOON)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(lambda: list(as_completed(tickets, SOON)))
        for ticket in tickets:
            assert ticket.cancel()
        assert ticket.cancel()  # once more
        gate.open.set()
        assert set(waiting.result(SOON)) == set(tickets)
    assert not wait(tickets, 0).not_done


def test_there_is_work_from_a_requests_coming_to_its_end(make_engine: MakeEngine) -> None:
    """Asked between any two lines of the engine's, as another thread may; the request is never there twice either."""
    engine, seen = make_engine(), []

    def ask(frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        if not frame.f_code.co_filename.endswith("generation/engine/engine.py"):
            return None
        seen.append((engine.has_work, engine.waiting))
        return ask

    engine.submit(drawn(0, 2))
    before = sys.gettrace()
    sys.settrace(ask)
    try:
        engine.step()
    finally:
        sys.settrace(before)
    assert set(seen) == {(True, 1), (True, 0)}
    assert sorted(seen, reverse=True) == seen
