"""The thread around an engine: whoever asks gets an answer, whatever happens to it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor

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
    """A watcher that holds the engine at its first step until it is opened."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, update: Update) -> None:
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
