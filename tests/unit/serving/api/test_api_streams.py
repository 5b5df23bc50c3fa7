"""Streams, and clients that go away."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI
from tests.support.serving import HeldUp, RunningApp, held_up, picture_of, png_of, wait_until

from unclip.generation.engine.metrics import EngineMetrics
from unclip.serving.drawing import orders
from unclip.serving.drawing.previews import Previews
from unclip.serving.drawing.service import Caller
from unclip.serving.groups import Shown
from unclip.serving.messages import events
from unclip.serving.messages.schemas import GenerationBody

PROMPT = "a red heart"
STAGES = ["prior", "decoder", "upsampler_256", "upsampler_1024"]


def test_a_stream_ends_with_the_picture_that_comes_without_one(client: OpenAI) -> None:
    stream = client.images.generate(prompt=PROMPT, stream=True, partial_images=3, extra_body={"seed": 7})
    told = list(stream)
    assert [event.type for event in told] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in told[:-1]] == [0, 1, 2]
    assert [event.size for event in told] == ["16x16", "32x32", "64x64", "64x64"]
    assert [picture_of(event).shape[0] for event in told] == [16, 32, 64, 64]
    done = told[-1]
    assert (done.output_format, done.background, done.quality, done.seed) == ("png", "opaque", "high", 7)
    assert done.usage.total_tokens == 0
    plain = client.images.generate(prompt=PROMPT, extra_body={"seed": 7}).data[0]
    assert np.array_equal(picture_of(done), picture_of(plain))
    assert done.parameters == plain.parameters


def test_previews_come_nearer_to_the_picture(client: OpenAI) -> None:
    body = {"seed": 7, "num_inference_steps": 20}
    stream = client.images.generate(prompt=PROMPT, stream=True, partial_images=3, size="16x16", extra_body=body)
    *shown, done = [picture_of(event).astype(float) for event in stream]
    away = [np.abs(picture - done).mean() for picture in shown]
    assert away[0] > away[-1] > 0


def test_progress_of_several_pictures(client: OpenAI) -> None:
    body = {"seed": 7, "progress": True}
    told = list(client.images.generate(prompt=PROMPT, n=2, stream=True, extra_body=body))
    for picture in (0, 1):
        own = [event for event in told if event.picture == picture]
        assert own[-1].type == "image_generation.completed"
        assert own[-1].seed == 7 + picture
        progress = [(event.stage, event.share) for event in own[:-1]]
        places = [(STAGES.index(stage), share) for stage, share in progress]
        assert places == sorted(places)
        assert {stage for stage, _ in progress} <= set(STAGES)
        assert progress[-1] == ("upsampler_1024", 1.0)
        assert all(event.steps / event.total == event.share for event in own[:-1])


def test_edits_stream_events_of_their_own(client: OpenAI) -> None:
    keep = np.ones((64, 64), bool)
    keep[:, 32:] = False
    image = png_of(np.full((64, 64, 3), 200, np.uint8), keep)
    stream = client.images.edit(image=("a.png", image), prompt=PROMPT, stream=True, partial_images=1)
    assert [event.type for event in stream] == ["image_edit.partial_image", "image_edit.completed"]


def test_what_is_refused_at_once_is_no_stream(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt=PROMPT, size="999x999", stream=True)
    assert caught.value.param == "size"


def test_a_failure_on_the_way_is_the_last_event(client: OpenAI) -> None:
    with pytest.raises(openai.APIError, match="not done in its time") as caught:
        list(client.images.generate(prompt=PROMPT, stream=True, extra_body={"timeout_s": 1e-3}))
    assert caught.value.body["code"] == "timeout"


def test_events_are_as_the_standard_has_them(app: RunningApp) -> None:
    body = {"prompt": PROMPT, "stream": True, "size": "16x16"}
    answer = httpx.post(f"{app.url}/v1/images/generations", json=body, timeout=60)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    assert "content-length" not in answer.headers
    comment, completed, end = answer.text.split("\n\n")
    assert comment.startswith(":")
    name, data = completed.split("\n")
    assert name == "event: image_generation.completed"
    assert json.loads(data.removeprefix("data: "))["type"] == "image_generation.completed"
    assert end == ""


def test_silence_is_broken_by_comments(app: RunningApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unclip.serving.messages.events.PING_S", 0.01)
    body = {"prompt": PROMPT, "stream": True}
    with held_up(app) as held, httpx.stream("POST", f"{app.url}/v1/images/generations", json=body) as answer:
        lines = answer.iter_lines()
        comments = [line for line in _first(lines, 6) if line]
        assert comments == [events.HERE.encode().decode().strip()] * 3
        held.let_go()
        assert "event: image_generation.completed" in list(lines)


def test_who_closes_a_stream_ends_the_work_within_a_step(app: RunningApp) -> None:
    before = _idle(app)
    body = {"prompt": PROMPT, "n": 3, "stream": True, "num_inference_steps": 40}
    with held_up(app) as held:
        with httpx.stream("POST", f"{app.url}/v1/images/generations", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            held.wait()
        _assert_ended(app, held, before, pictures=3)


def test_who_goes_as_an_event_comes_is_gone() -> None:
    async def leaves() -> None:
        told: asyncio.Queue[events.Event | None] = asyncio.Queue()
        reader = asyncio.create_task(events.next_of(told))
        for _ in range(5):
            await asyncio.sleep(0)
        told.put_nowait(events.HERE)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader

    asyncio.run(leaves())


def test_who_does_not_read_keeps_no_place(app: RunningApp) -> None:
    _idle(app)
    body = GenerationBody(prompt=PROMPT, n=2, stream=True, partial_images=3)
    order = orders.generation(body, app.service.models.current, app.service.config.limits)
    stream = app.service.stream(order, Caller(None, "http://here/"))

    def told(coming: Coroutine[Any, Any, events.Event]) -> events.Event:
        return asyncio.run_coroutine_threadsafe(coming, app.loop).result(30)

    assert told(anext(stream)) is events.HERE
    wait_until(lambda: app.service.admission.in_flight == 0)
    names = [told(anext(stream)).name for _ in range(8)]
    assert names.count("image_generation.completed") == 2
    assert names.count("image_generation.partial_image") == 6
    asyncio.run_coroutine_threadsafe(stream.aclose(), app.loop).result(30)


def test_who_hangs_up_without_a_stream_ends_the_work_within_a_step(app: RunningApp) -> None:
    before = _idle(app)
    body = json.dumps({"prompt": PROMPT, "n": 3, "num_inference_steps": 40}).encode()
    host, port = app.url.removeprefix("http://").split(":")
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with held_up(app) as held:
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            held.wait()
        _assert_ended(app, held, before, pictures=3)
    assert app.meters.value("unclip_serve_pictures", kind="generation", outcome="cancelled") >= 3


def test_one_picture_that_fails_ends_the_others(app: RunningApp, client: OpenAI) -> None:
    before = _idle(app)
    failed: list[openai.APIStatusError] = []

    def ask() -> None:
        with pytest.raises(openai.InternalServerError) as caught:
            client.images.generate(prompt=PROMPT, n=3)
        failed.append(caught.value)

    asking = threading.Thread(target=ask)
    with held_up(app) as held:
        asking.start()
        held.wait()
        held.error = RuntimeError("a secret of the inside")
        held.let_go()
        asking.join(60)
    [error] = failed
    assert error.status_code == 500
    assert error.code == "internal_error"
    assert error.request_id in error.message
    assert "secret" not in error.response.text
    wait_until(lambda: app.service.admission.in_flight == 0)
    assert _idle(app).finished == before.finished
    assert client.images.generate(prompt=PROMPT).data is not None


@pytest.mark.parametrize(
    ("count", "stages", "moments"),
    [
        (0, 3, []),
        (1, 1, [(0, 6)]),
        (3, 1, [(0, 3), (0, 6), (0, 9)]),
        (1, 2, [(0, 12)]),
        (2, 3, [(0, 12), (1, 12)]),
        (3, 3, [(0, 9), (1, 6), (2, 3)]),
    ],
)
def test_partial_images_are_even_over_the_stages(count: int, stages: int, moments: list[tuple[int, int]]) -> None:
    names = STAGES[1 : 1 + stages]
    previews = Previews(count, names)
    picture = np.zeros((1, 1, 3), np.uint8)
    steps = {max(1, round(share * 12)) for share in previews.shares}
    found = [
        (stage, step)
        for stage, name in enumerate(names)
        for step in range(1, 13)
        if previews.takes(Shown(name, step, 12, picture if step in steps else None))
    ]
    assert found == moments


def _assert_ended(app: RunningApp, held: HeldUp, before: EngineMetrics, *, pictures: int) -> None:
    """Nobody waits for them, all slots are free, and the step that waited was the last one."""
    wait_until(lambda: app.service.admission.in_flight == 0)
    steps = held.steps
    held.let_go()
    after = _idle(app)
    assert after.cancelled - before.cancelled == pictures
    assert after.finished == before.finished
    assert after.queued_steps == 0
    assert all(stage.running == 0 for stage in after.stages.values())
    assert held.steps == steps


def _idle(app: RunningApp) -> EngineMetrics:
    """What the engine has counted up to now, when it has nothing to do."""
    wait_until(lambda: app.group.metrics().running + app.group.metrics().waiting == 0)
    return app.group.metrics()


def _first(lines: Iterator[str], count: int) -> list[str]:
    return [next(lines) for _ in range(count)]
