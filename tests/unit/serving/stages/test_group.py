"""A group of stages in this process: who gives up frees the slots, who watches sees all previews, and illness is told."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.engines import assert_same_pictures, unit

from unclip.config.base import ConfigError
from unclip.generation.engine.request import DeadlineError, EngineStoppedError, Request, Result, StageFailedError
from unclip.pipelines.bundle import Bundle, BundleError
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.pipeline import Pipeline
from unclip.serving.config import STAGES, GroupStage, ServeConfig
from unclip.serving.groups import Call, Shown, UnknownRevisionError
from unclip.serving.observe.meters import MemoryMeters
from unclip.serving.stages import group as group_module
from unclip.serving.stages.group import LocalGroup, UnhealthyError

SOON = 60.0
LONG = GenerationOptions().merged({"up_to": 16, "decoder": {"num_inference_steps": 50}})


@asynccontextmanager
async def running(
    uri: str, stages: tuple[GroupStage, ...] = STAGES, *, limits: dict[str, Any] | None = None, **further: Any
) -> AsyncIterator[tuple[LocalGroup, Callable[[Request], Call]]]:
    """A group with real weights, and the calls of it."""
    group = LocalGroup(ServeConfig.from_dict({"device": "cpu", "limits": limits or {}}), stages, **further)
    try:
        await group.load(uri)
        digest = Bundle.load(uri).digest
        yield group, lambda request: Call(request, digest)
    finally:
        await group.close(0)


@contextmanager
def hooked(group: LocalGroup, stage: str, hook: Callable[[], None]) -> Iterator[None]:
    """Something happens in each step of a stage, on the engine's thread."""
    handle = group._revisions.current.stages.networks[stage].register_forward_pre_hook(lambda *_: hook())
    try:
        yield
    finally:
        handle.remove()


class Gate:
    """Holds the steps of a stage until it is opened."""

    def __init__(self) -> None:
        self.steps = 0
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.steps += 1
        self.reached.set()
        assert self.open.wait(SOON)


async def until(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < ends
        await asyncio.sleep(0.002)


def test_pictures_are_those_of_the_pipeline(tiny_bundle: str) -> None:
    async def main() -> None:
        pipeline, meters = Pipeline.from_bundle(Bundle.load(tiny_bundle)), MemoryMeters()
        async with running(tiny_bundle, meters=meters) as (group, call):
            results = await asyncio.gather(
                *(group.generate(call(Request(prompt="two dogs", seed=seed))) for seed in range(3))
            )
            await until(lambda: group.metrics().finished == 3)  # published after the step
            assert group.queued_steps() == 0
            await group.check_health()
        expected = pipeline(["two dogs"] * 3, [0, 1, 2]).images
        for seed, result in enumerate(results):
            assert_same_pictures(result.images, {size: pictures[seed] for size, pictures in expected.items()})
        assert meters.observations("unclip_serve_stage_seconds", group="all", stage="decoder") == 3
        assert meters.value("unclip_serve_revision", group="all", digest=Bundle.load(tiny_bundle).digest) == 1

    asyncio.run(main())


def test_a_group_of_clip_alone_has_no_engine(tiny_bundle: str) -> None:
    async def main() -> None:
        async with running(tiny_bundle, ("clip",)) as (group, call):
            assert group.metrics() is None
            digest = call(Request()).revision
            assert len(await group.encode_texts(["two dogs"], digest)) == 1
            with pytest.raises(ConfigError, match="takes no steps"):
                await group.generate(call(Request(prompt="two dogs")))
            await group.check_health()
        async with running(tiny_bundle, ("upsampler_256",)) as (group, call):
            with pytest.raises(ConfigError, match="no CLIP"):
                await group.encode_texts(["two dogs"], digest)
            low_res = np.zeros((16, 16, 3), dtype=np.uint8)
            request = Request(low_res=low_res, stages=("upsampler_256",))
            assert set((await group.generate(call(request))).images) == {32}

    asyncio.run(main())


def test_who_gives_up_frees_the_slots_before_the_next_step(tiny_bundle: str) -> None:
    async def main() -> None:
        async with running(tiny_bundle) as (group, call):
            gate = Gate()
            with hooked(group, "decoder", gate):
                asked = [
                    asyncio.create_task(group.generate(call(Request(image_embed=unit(seed), options=LONG))))
                    for seed in range(3)
                ]
                await until(gate.reached.is_set)
                for task in asked:
                    task.cancel()
                assert all(
                    isinstance(end, asyncio.CancelledError)
                    for end in await asyncio.gather(*asked, return_exceptions=True)
                )
                gate.open.set()
                await until(lambda: group.metrics().cancelled == 3)
                taken = gate.steps
                metrics = group.metrics()
                assert (metrics.waiting, metrics.running) == (0, 0)
                assert [stage.running + stage.waiting for stage in metrics.stages.values()] == [0] * 4
                await asyncio.sleep(0.1)
                assert gate.steps == taken <= 2

    asyncio.run(main())


def test_steps_are_shown_with_pictures_where_they_are_wanted(tiny_bundle: str) -> None:
    async def main() -> None:
        async with running(tiny_bundle) as (group, call):
            request = Request(prompt="two dogs", seed=4)
            steps = [step async for step in group.watch(call(request), [0.5, 1.0])]
            *shown, result = steps
            assert isinstance(result, Result)
            assert all(isinstance(step, Shown) for step in shown)
            assert_same_pictures(result.images, (await group.generate(call(request))).images)
            pictures = {(step.stage, step.steps): step.picture for step in shown if step.picture is not None}
            assert list(pictures) == [
                ("decoder", 2),
                ("decoder", 3),
                ("upsampler_256", 1),
                ("upsampler_256", 2),
                ("upsampler_1024", 1),
                ("upsampler_1024", 2),
            ]
            for (stage, _), size in ((("decoder", 3), 16), (("upsampler_256", 2), 32), (("upsampler_1024", 2), 64)):
                last = [picture for (name, _), picture in pictures.items() if name == stage][-1]
                assert_same_pictures({size: last}, {size: result.images[size]})

    asyncio.run(main())


def test_a_slow_reader_misses_steps_but_no_pictures(tiny_bundle: str) -> None:
    async def main() -> None:
        async with running(tiny_bundle) as (group, call):
            request = Request(image_embed=unit(1), options=LONG)
            async with aclosing(group.watch(call(request), [0.1, 0.5, 1.0])) as steps:
                first = await anext(steps)
                await until(lambda: group.metrics().finished == 1)
                rest = [step async for step in steps]
            assert isinstance(rest[-1], Result)
            shown = [first, *rest[:-1]]
            assert [step.steps for step in shown if step.picture is not None] == [5, 25, 50]
            assert len(shown) < 15

    asyncio.run(main())


def test_closing_a_stream_early_ends_the_work(tiny_bundle: str) -> None:
    async def main() -> None:
        async with running(tiny_bundle) as (group, call):
            request = Request(image_embed=unit(1), options=LONG)
            async with aclosing(group.watch(call(request), [])) as steps:
                await anext(steps)
            await until(lambda: group.metrics().cancelled == 1)
            assert group.metrics().stages["decoder"].running == 0
            assert group.metrics().stages["decoder"].steps < 50

    asyncio.run(main())


def test_errors_arrive_as_the_engine_has_them(tiny_bundle: str) -> None:
    async def main() -> None:
        async with running(tiny_bundle) as (group, call):
            with pytest.raises(ValueError, match="none is given"):
                await group.generate(call(Request()))
            with pytest.raises(DeadlineError):
                await group.generate(call(Request(image_embed=unit(1), options=LONG, timeout=1e-3)))
            with pytest.raises(DeadlineError):
                async for _ in group.watch(call(Request(image_embed=unit(1), options=LONG, timeout=1e-3)), []):
                    pass
            with pytest.raises(UnknownRevisionError, match="0123456789ab"):
                await group.generate(Call(Request(prompt="two dogs"), "0123456789abcdef"))
            failing = hooked(group, "decoder", _raises(FloatingPointError("a row is not finite")))
            with failing, pytest.raises(StageFailedError, match="stage decoder failed: a row is not finite"):
                await group.generate(call(Request(prompt="two dogs")))
            await group.check_health()
            waiting = asyncio.create_task(group.generate(call(Request(image_embed=unit(1), options=LONG))))
            await until(lambda: group.metrics().running == 1)
            await group.close(0)
            with pytest.raises(EngineStoppedError):
                await waiting

    asyncio.run(main())


def test_without_weights_it_is_not_well(tmp_path) -> None:
    async def main() -> None:
        group = LocalGroup(ServeConfig.from_dict({"device": "cpu"}), STAGES)
        with pytest.raises(UnhealthyError, match="no weights"):
            await group.check_health()
        with pytest.raises(BundleError, match="is no bundle"):
            await group.load(str(tmp_path))
        assert "is no bundle" in group.refused[str(tmp_path)]
        with pytest.raises(UnhealthyError, match="no weights"):
            await group.check_health()

    asyncio.run(main())


def test_a_step_that_lasts_is_an_illness_that_does_not_hold_up_the_check(tiny_bundle: str) -> None:
    async def main() -> None:
        async with running(tiny_bundle, limits={"stalled_s": 0.2}) as (group, call):
            gate = Gate()
            with hooked(group, "decoder", gate):
                asked = asyncio.create_task(group.generate(call(Request(image_embed=unit(1), options=LONG))))
                await until(gate.reached.is_set)
                await asyncio.sleep(0.25)
                with pytest.raises(UnhealthyError, match="the engine's step has taken"):
                    await group.check_health()
                gate.open.set()
                await asked
            await group.check_health()

    asyncio.run(main())


def test_work_without_steps_is_an_illness(tiny_bundle: str) -> None:
    async def main() -> None:
        async with running(tiny_bundle, limits={"stalled_s": 0.2}) as (group, call):
            await group.check_health()
            await asyncio.sleep(0.25)
            await group.check_health()  # nobody asks for anything
            group._revisions.current.worker._engine.step = lambda: time.sleep(0.001)
            asked = asyncio.create_task(group.generate(call(Request(prompt="two dogs"))))
            await asyncio.sleep(0.01)
            await group.check_health()
            await asyncio.sleep(0.25)
            with pytest.raises(UnhealthyError, match="work without a finished step"):
                await group.check_health()
            asked.cancel()

    asyncio.run(main())


def test_dead_threads_are_an_illness(tiny_bundle: str) -> None:
    async def main() -> None:
        async with running(tiny_bundle) as (group, call):
            dying = hooked(group, "decoder", _raises(SystemExit("gone")))
            with dying, pytest.raises(EngineStoppedError, match="thread died"):
                await group.generate(call(Request(prompt="two dogs")))
            with pytest.raises(UnhealthyError, match="the engine's thread is dead"):
                await group.check_health()
        async with running(tiny_bundle, ("clip",)) as (group, call):
            with hooked_clip(group, SystemExit("gone")), pytest.raises(EngineStoppedError):
                await group.encode_texts(["two dogs"], call(Request()).revision)
            with pytest.raises(UnhealthyError, match="CLIP encoder's thread is dead"):
                await group.check_health()

    asyncio.run(main())


def test_a_broken_device_is_an_illness(tiny_bundle: str) -> None:
    """After such an error every call of CUDA fails."""

    async def main() -> None:
        error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        async with running(tiny_bundle) as (group, call):
            with hooked(group, "decoder", _raises(error)), pytest.raises(StageFailedError):
                await group.generate(call(Request(prompt="two dogs")))
            with pytest.raises(UnhealthyError, match="illegal memory access"):
                await group.check_health()
        async with running(tiny_bundle, ("clip",)) as (group, call):
            with hooked_clip(group, error), pytest.raises(StageFailedError):
                await group.encode_texts(["two dogs"], call(Request()).revision)
            with pytest.raises(UnhealthyError, match="illegal memory access"):
                await group.check_health()

    asyncio.run(main())


def test_who_asks_meanwhile_waits_for_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is at work answers late, and anybody may ask `GET /health`: that is no illness."""
    asked, answers = [], threading.Event()

    class Stream:
        def __init__(self, device: torch.device) -> None:
            asked.append(device)

        def synchronize(self) -> None:
            assert answers.wait(SOON)

    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)

    async def main() -> None:
        health = group_module._Health(torch.device("cuda"), 60.0)
        checks = [asyncio.create_task(health.check_device()) for _ in range(3)]
        await until(lambda: bool(asked))
        answers.set()
        await asyncio.gather(*checks)
        await health.check_device()
        assert len(asked) == 2

        answers.clear()
        monkeypatch.setattr(group_module, "_DEVICE_SECONDS", 0.05)
        for _ in range(2):
            with pytest.raises(UnhealthyError, match="has not answered"):
                await health.check_device()
        assert len(asked) == 3
        answers.set()
        await health._asking

    asyncio.run(main())


def test_weights_that_come_back_begin_anew(tiny_bundle: str) -> None:
    """Their first step is not looked for since they were there before."""

    async def main() -> None:
        async with running(tiny_bundle, limits={"stalled_s": 0.2}) as (group, _):
            bundle, health = Bundle.load(tiny_bundle), group._health
            for _ in range(2):
                revision = group._revisions._loader.load(bundle, None)
                revision.worker._engine.step = lambda: time.sleep(0.001)
                revision.tickets.add(revision.worker.submit(Request(prompt="two dogs")))
                health.check_revision(revision)
                revision.close()
                await asyncio.sleep(0.25)

    asyncio.run(main())


def test_a_group_on_the_cpu_asks_no_gpu_for_its_memory(tiny_bundle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking takes hundreds of MB of each."""
    asked = []
    monkeypatch.setattr(group_module, "publish_devices", asked.append)

    async def main() -> None:
        meters = MemoryMeters()
        async with running(tiny_bundle, meters=meters):
            await until(lambda: meters.value("unclip_serve_slots") > 0)
            await asyncio.sleep(0.05)

    asyncio.run(main())
    assert not asked


@contextmanager
def hooked_clip(group: LocalGroup, error: BaseException) -> Iterator[None]:
    clip = group._revisions.current.stages.clip.clip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip, "encode_text", lambda *_: _raises(error)())
        yield


def _raises(error: BaseException) -> Callable[[], None]:
    def raise_it() -> None:
        raise error

    return raise_it
