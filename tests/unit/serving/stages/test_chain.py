"""A picture's way through groups of stages: the same picture whatever the layout, whatever fails on the way."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.engines import assert_same_pictures, unit
from tests.support.revisions import save_with_other_weights

from unclip.generation.engine.request import (
    DeadlineError,
    EncodedCaption,
    EngineFullError,
    EngineStoppedError,
    Picture,
    Request,
    Result,
    StageFailedError,
)
from unclip.pipelines.bundle import Bundle, BundleError
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.known import known_at
from unclip.pipelines.pipeline import Pipeline
from unclip.serving.config import STAGES, GroupStage, ServeConfig
from unclip.serving.errors import Overloaded
from unclip.serving.groups import Call, GroupUnavailableError, Shown, StageGroup, UnknownRevisionError
from unclip.serving.observe.meters import MemoryMeters
from unclip.serving.stages.chain import Chain
from unclip.serving.stages.group import LocalGroup
from unclip.serving.stages.model import Model, Models

ONE = (STAGES,)
THREE = (("clip", "prior"), ("decoder",), ("upsampler_256", "upsampler_1024"))
FIVE = tuple((stage,) for stage in STAGES)
LAYOUTS: tuple[tuple[tuple[GroupStage, ...], ...], ...] = (ONE, THREE, FIVE)
AS_IT_IS = GenerationOptions()


@dataclass
class Recorder:
    """A group whose calls are known, and that fails when it is told to: before it has done anything, or after."""

    group: StageGroup
    calls: list[Call | Sequence[Any]]
    failures: Callable[[], tuple[Exception | None, Exception | None]] = lambda: (None, None)

    async def generate(self, call: Call) -> Result:
        return await self._recorded(call, lambda: self.group.generate(call))

    async def watch(self, call: Call, previews: Sequence[float]) -> AsyncIterator[Shown | Result]:
        before, after = self.failures()
        self.calls.append(call)
        if before is not None:
            raise before
        async with aclosing(self.group.watch(call, previews)) as steps:
            async for step in steps:
                if after is not None and isinstance(step, Result):
                    raise after
                yield step

    async def encode_texts(self, texts: Sequence[str], revision: str) -> list[EncodedCaption]:
        return await self._recorded(texts, lambda: self.group.encode_texts(texts, revision))

    async def encode_pictures(self, pictures: Sequence[Picture], revision: str) -> torch.Tensor:
        return await self._recorded(pictures, lambda: self.group.encode_pictures(pictures, revision))

    async def _recorded(self, call: Any, work: Callable[[], Awaitable[Any]]) -> Any:
        before, after = self.failures()
        self.calls.append(call)
        if before is not None:
            raise before
        answer = await work()
        if after is not None:
            raise after
        return answer


@dataclass
class Layout:
    chain: Chain
    recorders: list[Recorder]
    groups: list[LocalGroup]
    models: Models
    meters: MemoryMeters

    @property
    def calls(self) -> list[int]:
        return [len(recorder.calls) for recorder in self.recorders]

    def fail(self, number: int, *failures: tuple[Exception | None, Exception | None]) -> None:
        """The next calls of a group, in their order."""
        left = list(failures)
        self.recorders[number].failures = lambda: left.pop(0) if left else (None, None)


@asynccontextmanager
async def running(uri: str, stages: Sequence[tuple[GroupStage, ...]]) -> AsyncIterator[Layout]:
    """Groups with real weights."""
    config, meters = ServeConfig(bundle=uri, device="cpu"), MemoryMeters()
    groups = [LocalGroup(config, held) for held in stages]
    try:
        for group in groups:
            await group.load(uri)
        recorders = [Recorder(group, []) for group in groups]
        models = Models(Model.load(uri, config.options))
        chain = Chain(list(zip(stages, recorders, strict=True)), models, meters=meters)
        yield Layout(chain, recorders, groups, models, meters)
    finally:
        for group in groups:
            await group.close(0)


def requests() -> dict[str, Request]:
    """One of each kind."""
    options = GenerationOptions().merged({"prior": {"num_inference_steps": 4}, "decoder": {"guidance_scale": 3.0}})
    kept = np.zeros((1, 64, 64), dtype=bool)
    kept[:, :32] = True
    picture = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    known = known_at(torch.from_numpy(picture)[None], torch.from_numpy(kept), (16, 32, 64), feather=1 / 64)
    return {
        "prompt": Request(prompt="a red heart", seed=1, options=options),
        "negative": Request(prompt="a red heart", negative_prompt="blue", seed=1, options=options),
        "small": Request(prompt="two dogs", seed=2, options=AS_IT_IS.merged({"up_to": 16})),
        "embedding": Request(image_embed=unit(3), seed=3),
        "caption alone": Request(prompt="two dogs", stages=("decoder", "upsampler_256", "upsampler_1024"), seed=4),
        "known": Request(prompt="two dogs", seed=5, known=known, timeout=60),
        "x_T": Request(image_embed=unit(6), x_T=torch.randn(3, 16, 16, generator=torch.manual_seed(6)), seed=6),
        "upsampling": Request(low_res=picture[:16, :16].copy(), seed=7),
        "inversion": Request(image_embed=unit(8), inverts=picture[:16, :16].copy(), seed=8),
    }


def assert_same(mine: Result, theirs: Result) -> None:
    assert_same_pictures(mine.images, theirs.images)
    assert mine.seed == theirs.seed
    assert mine.settings == theirs.settings
    for name in ("image_embed", "x_T"):
        one, other = getattr(mine, name), getattr(theirs, name)
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


def test_the_same_picture_from_one_process_as_from_many(tiny_bundle: str) -> None:
    async def drawn(stages) -> tuple[dict[str, Result], list[int]]:
        async with running(tiny_bundle, stages) as layout:
            asked = requests()
            found = await asyncio.gather(*(layout.chain.draw(request) for request in asked.values()))
            return dict(zip(asked, found, strict=True)), layout.calls

    (one, calls), *others = [asyncio.run(drawn(stages)) for stages in LAYOUTS]
    assert calls == [len(requests())]
    for found, _ in others:
        for name, result in found.items():
            assert_same(result, one[name])
    assert set(one["prompt"].images) == {16, 32, 64}
    assert one["caption alone"].image_embed is None
    pipeline = Pipeline.from_bundle(Bundle.load(tiny_bundle))
    for name in ("prompt", "small"):
        request = requests()[name]
        expected = pipeline([request.prompt], [request.seed], options=request.options).images
        assert_same_pictures(one[name].images, {size: pictures[0] for size, pictures in expected.items()})


def test_groups_are_asked_for_no_more_than_they_are_needed_for(tiny_bundle: str) -> None:
    async def main() -> None:
        asked = requests()
        async with running(tiny_bundle, FIVE) as layout:
            for name, calls in {
                "prompt": [1, 1, 1, 1, 1],
                "small": [1, 1, 1, 0, 0],
                "embedding": [0, 0, 1, 1, 1],
                "caption alone": [0, 0, 1, 1, 1],
                "upsampling": [0, 0, 0, 1, 1],
                "inversion": [0, 0, 1, 0, 0],
            }.items():
                before = layout.calls
                await layout.chain.draw(asked[name])
                assert [now - then for now, then in zip(layout.calls, before, strict=True)] == calls, name
            assert len(layout.recorders[0].calls[0]) == 1
        async with running(tiny_bundle, THREE) as layout:
            result = await layout.chain.draw(asked["known"])
            first, decoder, upsamplers = (recorder.calls[0].request for recorder in layout.recorders)
            assert (first.encoded, first.known, set(decoder.known)) == (None, {}, {16})
            assert (upsamplers.prompt, set(upsamplers.known)) == (None, {32, 64})
            assert 60 >= first.timeout > decoder.timeout > upsamplers.timeout > 60 - result.seconds - 1
            assert 0 <= result.queue_seconds <= result.seconds

    asyncio.run(main())


def test_encodings_are_those_of_the_clip(tiny_bundle: str) -> None:
    async def main() -> None:
        pipeline = Pipeline.from_bundle(Bundle.load(tiny_bundle))
        texts, pictures = (
            ["two dogs", "a red heart"],
            np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8),
        )
        async with running(tiny_bundle, FIVE) as layout:
            captions = await layout.chain.encode_texts(texts)
            torch.testing.assert_close(torch.stack([it.text_embed for it in captions]), pipeline.encode_text(texts))
            torch.testing.assert_close(
                await layout.chain.encode_pictures(list(pictures)), pipeline.encode_image(pictures)
            )

    asyncio.run(main())


def test_failures_that_pass_change_nothing(tiny_bundle: str, monkeypatch) -> None:
    """Each group may fail up to many times in a row, before or after its work."""
    monkeypatch.setattr("unclip.serving.stages.patience._FIRST_PAUSE_S", 1e-3)

    async def drawn(layout: Layout, seed: int, watched: bool) -> None:
        request = Request(prompt="a red heart", seed=seed, timeout=60)
        expected = await layout.chain.draw(request)
        chance = random.Random(seed)
        for recorder in layout.recorders:
            recorder.failures = lambda: _failure(chance)
        try:
            if not watched:
                assert_same(await layout.chain.draw(request), expected)
                return
            *shown, result = [step async for step in layout.chain.watch(request, [0.5, 1.0])]
        finally:
            for recorder in layout.recorders:
                recorder.failures = lambda: (None, None)
        assert_same(result, expected)
        steps = [(STAGES.index(each.stage), each.steps) for each in shown]
        assert steps == sorted(set(steps))
        assert [each.picture.shape[0] for each in shown if each.picture is not None] == [16, 16, 32, 32, 64, 64]

    with asyncio.Runner() as runner:
        layouts = running(tiny_bundle, THREE)
        layout = runner.run(layouts.__aenter__())

        @settings(max_examples=25, deadline=None)
        @given(seed=st.integers(0, 2**16), watched=st.booleans())
        def property_holds(seed: int, watched: bool) -> None:
            runner.run(drawn(layout, seed, watched))

        try:
            property_holds()
        finally:
            runner.run(layouts.__aexit__(None, None, None))


def _failure(chance: random.Random) -> tuple[Exception | None, Exception | None]:
    if chance.random() < 0.6:
        return None, None
    error = chance.choice((GroupUnavailableError, EngineStoppedError))("gone for a moment")
    return (error, None) if chance.random() < 0.5 else (None, error)


def test_a_stage_may_fail_once(tiny_bundle: str) -> None:
    async def main() -> None:
        broken = StageFailedError("stage decoder failed")
        request = requests()["small"]
        async with running(tiny_bundle, THREE) as layout:
            expected = await layout.chain.draw(request)
            layout.fail(1, (broken, None))
            assert_same(await layout.chain.draw(request), expected)
            assert layout.meters.value("unclip_serve_retries", group="decoder", reason="StageFailedError") == 1
            before = layout.calls
            layout.fail(1, (broken, None), (GroupUnavailableError("gone"), None), (broken, None))
            with pytest.raises(StageFailedError):
                await layout.chain.draw(request)
            assert [now - then for now, then in zip(layout.calls, before, strict=True)] == [1, 3, 0]

    asyncio.run(main())


def test_a_full_server_refuses_and_a_picture_that_has_begun_waits(tiny_bundle: str) -> None:
    async def main() -> None:
        full, request = EngineFullError("256 requests wait already"), requests()["prompt"]
        async with running(tiny_bundle, THREE) as layout:
            layout.fail(2, *[(full, None)] * 3)
            assert set((await layout.chain.draw(request)).images) == {16, 32, 64}
            assert layout.calls == [1, 1, 4]
            layout.fail(0, (full, None))
            with pytest.raises(Overloaded) as refusal:
                await layout.chain.draw(request)
            assert refusal.value.retry_after >= 1
            assert layout.calls == [2, 1, 4]

    asyncio.run(main())


def test_time_counts_for_the_whole_way(tiny_bundle: str) -> None:
    async def main() -> None:
        request = replace(requests()["prompt"], timeout=0.5)
        async with running(tiny_bundle, THREE) as layout:
            layout.recorders[2].failures = lambda: (GroupUnavailableError("no process of the group answers"), None)
            with pytest.raises(DeadlineError, match="no process of the group answers"):
                await layout.chain.draw(request)
            layout.recorders[2].failures = lambda: (None, None)
            slow = AS_IT_IS.merged({"decoder": {"num_inference_steps": 50}})
            with pytest.raises(DeadlineError):
                await layout.chain.draw(replace(request, options=slow, timeout=0.02))
            with pytest.raises(ValueError, match="timeout"):
                await layout.chain.draw(replace(request, timeout=0.0))

    asyncio.run(main())


class Silent(Recorder):
    """A process that never answers."""

    async def generate(self, call: Call) -> Result:
        await asyncio.get_running_loop().create_future()
        raise AssertionError


def test_who_does_not_answer_is_not_waited_for(tiny_bundle: str) -> None:
    async def main() -> None:
        async with running(tiny_bundle, ONE) as layout:
            chain = Chain([(STAGES, Silent(layout.groups[0], []))], layout.models)
            with pytest.raises(DeadlineError, match=r"timeout = 0\.1"):
                await chain.draw(Request(prompt="two dogs", timeout=0.1))

    asyncio.run(main())


def test_a_picture_is_of_one_revision(tiny_bundle: str, tmp_path: Path) -> None:
    """The last group has only the old weights: the whole picture is drawn with them."""

    async def main() -> None:
        other = save_with_other_weights(tiny_bundle, tmp_path / "other")
        request = requests()["prompt"]
        async with running(tiny_bundle, THREE) as layout:
            old = await layout.chain.draw(request)
            for group in layout.groups[:2]:
                await group.load(other)
            layout.models.use(Model.load(other, AS_IT_IS))
            assert_same(await layout.chain.draw(request), old)
            await layout.groups[2].load(other)
            new = await layout.chain.draw(request)
        async with running(other, ONE) as layout:
            assert_same(await layout.chain.draw(request), new)
        assert np.abs(new.images[64].astype(int) - old.images[64].astype(int)).max() > 20

    asyncio.run(main())


def test_weights_that_come_while_it_waits_are_used(tiny_bundle: str, tmp_path: Path) -> None:
    async def main() -> None:
        other = save_with_other_weights(tiny_bundle, tmp_path / "other")
        async with running(other, ONE) as layout:
            models = Models(Model.load(tiny_bundle, AS_IT_IS))
            chain = Chain([(STAGES, layout.groups[0])], models)
            drawing = asyncio.create_task(chain.draw(Request(prompt="two dogs", timeout=60)))
            await asyncio.sleep(0.05)
            assert not drawing.done()
            models.use(Model.load(other, AS_IT_IS))
            assert await drawing
            chain = Chain([(STAGES, layout.groups[0])], Models(Model.load(tiny_bundle, AS_IT_IS)))
            with pytest.raises(DeadlineError) as failure:
                await chain.draw(Request(prompt="two dogs", timeout=0.3))
            assert isinstance(failure.value.__cause__, UnknownRevisionError)

    asyncio.run(main())


def test_closing_early_ends_the_work(tiny_bundle: str) -> None:
    async def main() -> None:
        options = AS_IT_IS.merged({"decoder": {"num_inference_steps": 50}})
        async with running(tiny_bundle, THREE) as layout:
            async with aclosing(layout.chain.watch(Request(prompt="two dogs", options=options), [])) as steps:
                async for step in steps:
                    assert isinstance(step, Shown)
                    if step.stage == "decoder":
                        break
            await asyncio.to_thread(layout.groups[1]._revisions.current.worker.close, patience=10)
            metrics = layout.groups[1].metrics()
            assert (metrics.cancelled, metrics.finished) == (1, 0)
            assert metrics.stages["decoder"].running == 0
            assert metrics.stages["decoder"].steps < 50

    asyncio.run(main())


def test_stages_that_nobody_holds_are_named(tiny_bundle: str) -> None:
    async def main() -> None:
        async with running(tiny_bundle, (("clip", "prior"), ("decoder",))) as layout:
            with pytest.raises(BundleError, match="upsampler_256, upsampler_1024"):
                await layout.chain.draw(requests()["prompt"])
            assert layout.calls == [0, 0]

    asyncio.run(main())
