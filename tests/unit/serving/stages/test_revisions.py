"""New weights while requests run: none is lost, each is drawn by one bundle, and what does not fit is refused."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.engines import assert_same_pictures, unit
from tests.support.revisions import save_with_other_weights

from unclip.config.base import ConfigError
from unclip.generation.engine.request import EngineError, Request, Result
from unclip.generation.engine.route import Stages
from unclip.pipelines.bundle import Bundle, BundleError
from unclip.pipelines.cascade import GenerationOptions
from unclip.serving.config import STAGES, ServeConfig
from unclip.serving.groups import Call, UnknownRevisionError
from unclip.serving.stages.chain import Chain
from unclip.serving.stages.group import LocalGroup
from unclip.serving.stages.model import Model, Models
from unclip.serving.stages.revisions import Loader, Revision, Revisions
from unclip.utils.hashing import sha256_file

SOON = 60.0
AS_IT_IS = GenerationOptions()
SMALL = GenerationOptions(up_to=16)
CONFIG = ServeConfig.from_dict({"device": "cpu", "engine": {"rows": {"decoder": 3}}})


@pytest.fixture(scope="module")
def other(tiny_bundle: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_with_other_weights(tiny_bundle, tmp_path_factory.mktemp("other"))


@asynccontextmanager
async def serving(uri: str, *, idle_s: float = 60.0) -> AsyncIterator[tuple[LocalGroup, Models, Chain]]:
    """Everything in one process."""
    group = LocalGroup(CONFIG)
    group._revisions._idle_s = idle_s
    try:
        await group.load(uri)
        models = Models(Model.load(uri, AS_IT_IS))
        yield group, models, Chain([(STAGES, group)], models)
    finally:
        await group.close(0)


async def until(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < ends
        await asyncio.sleep(0.005)


async def expected(uris: list[str], seeds: range) -> list[list[Result]]:
    """What each bundle makes of `asked` alone."""
    found = []
    for uri in uris:
        async with serving(uri) as (_, _, chain):
            found.append([await chain.draw(asked(seed)) for seed in seeds])
    return found


def asked(seed: int) -> Request:
    return Request(prompt="a red heart", seed=seed, options=SMALL, timeout=SOON)


def is_same(mine: Result, theirs: Result) -> bool:
    try:
        assert_same_pictures(mine.images, theirs.images)
    except AssertionError:
        return False
    return True


def little_room(loader: Loader, only_alone: bool) -> Callable[[Bundle, Revision | None], Revision]:
    """A device that holds one bundle, or none at all beyond the first."""
    load = loader.load

    def limited(bundle: Bundle, beside: Revision | None) -> Revision:
        if beside is not None or not only_alone:
            raise EngineError("a single picture takes 9 MiB, but the engine may take 1 MiB")
        return load(bundle, beside)

    return limited


@pytest.mark.parametrize("room_for_two", [True, False])
def test_no_request_is_lost_in_a_change(tiny_bundle: str, other: str, room_for_two: bool, monkeypatch) -> None:
    """A stream of requests: each is answered by exactly one of the two bundles, first by the old one, last by the new one."""
    seeds = range(3)

    async def main() -> None:
        olds, news = await expected([tiny_bundle, other], seeds)
        async with serving(tiny_bundle) as (group, models, chain):
            if not room_for_two:
                loader = group._revisions._loader
                limited = little_room(loader, only_alone=True)
                monkeypatch.setattr(Loader, "load", lambda self, bundle, beside: limited(bundle, beside))
            asking, answers = True, []

            async def stream(first: int) -> None:
                number = first
                while asking:
                    answers.append((number % 3, await chain.draw(asked(number % 3))))
                    number += 1

            streams = [asyncio.create_task(stream(seed)) for seed in seeds]
            await until(lambda: len(answers) >= 6)
            await group.load(other)
            models.use(Model.load(other, AS_IT_IS))
            at_change = len(answers)
            await until(lambda: len(answers) >= at_change + 9)
            asking = False
            await asyncio.gather(*streams)
            await group.check_health()
        by_old = [is_same(result, olds[seed]) for seed, result in answers]
        by_new = [is_same(result, news[seed]) for seed, result in answers]
        assert all(old != new for old, new in zip(by_old, by_new, strict=True))
        assert all(by_old[:6])
        assert all(by_new[-3:])

    asyncio.run(main())


def test_the_old_weights_stay_until_nobody_asks_for_them(tiny_bundle: str, other: str) -> None:
    async def main() -> None:
        old, new = Bundle.load(tiny_bundle).digest, Bundle.load(other).digest
        async with serving(tiny_bundle, idle_s=2.0) as (group, _, _):
            await group.load(other)
            revisions = group._revisions
            old_revision = next(revision for revision in revisions.held if revision.digest == old)
            assert revisions.current.digest == new
            await asyncio.sleep(2.5)  # nobody asks for either: the other processes may not know the new one yet
            assert len(revisions.held) == 2
            for _ in range(6):
                for digest in (new, old):
                    await group.generate(Call(asked(0), digest))
                await asyncio.sleep(0.4)
            assert len(revisions.held) == 2
            await group.generate(Call(asked(0), new))
            await until(lambda: len(revisions.held) == 1)
            await until(lambda: not old_revision.worker.is_alive)
            with pytest.raises(UnknownRevisionError):
                await group.generate(Call(asked(0), old))
            assert (await group.generate(Call(asked(0), new))).images

    asyncio.run(main())


def test_a_call_waits_for_weights_that_are_being_loaded(tiny_bundle: str, other: str) -> None:
    async def main() -> None:
        async with serving(tiny_bundle) as (group, _, _):
            loading = asyncio.create_task(group.load(other))
            await until(lambda: group._revisions.is_changing)
            result = await group.generate(Call(asked(0), Bundle.load(other).digest))
            await loading
            assert is_same(result, (await expected([other], range(1)))[0][0])

    asyncio.run(main())


def test_the_bundle_that_is_there_is_not_loaded_again(tiny_bundle: str, other: str, monkeypatch) -> None:
    async def main() -> None:
        async with serving(tiny_bundle) as (group, _, _):
            await group.load(other)
            first = group._revisions.held
            await group.load(tiny_bundle)
            await group.load(other)
            assert group._revisions.held == first
            assert group._revisions.current.digest == Bundle.load(other).digest

    asyncio.run(main())


def test_weights_that_are_asked_for_stay_when_a_third_bundle_comes(
    tiny_bundle: str, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another group has refused the second one, so that nobody ever asked for it."""

    async def main() -> None:
        old, third = Bundle.load(tiny_bundle).digest, save_with_other_weights(tiny_bundle, tmp_path / "third", seed=7)
        async with serving(tiny_bundle, idle_s=0.1) as (group, _, _):
            await group.generate(Call(asked(0), old))
            await group.load(other)
            revisions, may_load = group._revisions, threading.Event()
            load = Loader.load

            def late(self: Loader, bundle: Bundle, beside: Revision | None) -> Revision:
                assert may_load.wait(SOON)
                return load(self, bundle, beside)

            monkeypatch.setattr(Loader, "load", late)
            loading = asyncio.create_task(group.load(third))
            await until(lambda: revisions.is_changing and len(revisions.held) == 1)
            assert (await group.generate(Call(asked(0), old))).images
            may_load.set()
            await loading
            assert [revision.digest for revision in revisions.held] == [old, Bundle.load(third).digest]
            assert revisions.current.digest == Bundle.load(third).digest
            await group.generate(Call(asked(0), Bundle.load(third).digest))
            await until(lambda: len(revisions.held) == 1)

    asyncio.run(main())


def test_who_stops_waiting_does_not_stop_the_change(tiny_bundle: str, other: str) -> None:
    async def main() -> None:
        async with serving(tiny_bundle) as (group, _, _):
            loading = asyncio.create_task(group.load(other))
            await until(lambda: group._revisions.is_changing)
            loading.cancel()
            await until(lambda: not group._revisions.is_changing)
            assert group._revisions.current.digest == Bundle.load(other).digest

    asyncio.run(main())


def with_damage(uri: str, folder: Path, kind: str) -> str:
    """A copy whose decoder is not what it was."""
    shutil.copytree(uri, folder)
    weights, manifest = folder / "decoder" / "model.safetensors", folder / "decoder" / "manifest.json"
    if kind == "hash":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(bytes(content))
        return str(folder)
    tensors = load_file(weights)
    key = max(tensors, key=lambda key: tensors[key].numel())
    save_file({**tensors, key: 1.1 * tensors[key]}, weights)
    stored = json.loads(manifest.read_text())
    found = {"bytes": weights.stat().st_size, "sha256": sha256_file(weights)}
    manifest.write_text(json.dumps({**stored, "weights": found}))
    return str(folder)


def loaded_stages() -> int:
    """Of this process, those of other tests' servers among them."""
    gc.collect()
    return sum(isinstance(each, Stages) for each in gc.get_objects())


@pytest.mark.parametrize(("kind", "reason"), [("hash", "is damaged"), ("outputs", "does not compute here")])
def test_damaged_weights_are_refused_and_the_old_go_on(
    tiny_bundle: str, other: str, tmp_path: Path, kind: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        damaged = with_damage(other, tmp_path / "damaged", kind)
        async with serving(tiny_bundle) as (group, _, chain):
            before, there = await chain.draw(asked(1)), loaded_stages()
            with caplog.at_level("ERROR"), pytest.raises(BundleError, match=reason) as refusal:
                await group.load(damaged)
            assert loaded_stages() == there, "the refused weights are still there"
            assert group.refused[damaged] == str(refusal.value)
            assert "bundle_refused" in caplog.text
            await group.check_health()
            assert is_same(await chain.draw(asked(1)), before)
            assert len(group._revisions.held) == 1
            with pytest.raises(UnknownRevisionError):
                await group.generate(Call(asked(1), Bundle.load(damaged).digest))
            await group.load(other)
            assert list(group.refused) == [damaged]

    asyncio.run(main())


def test_a_bundle_that_options_do_not_suit_is_refused(tiny_bundle: str, tmp_path: Path) -> None:
    async def main() -> None:
        shutil.copytree(tiny_bundle, tmp_path / "without")
        shutil.rmtree(tmp_path / "without" / "upsampler_1024")
        group = LocalGroup(CONFIG.merged({"options": {"up_to": 64}}))
        try:
            await group.load(tiny_bundle)
            with pytest.raises(ConfigError, match="up_to = 64"):
                await group.load(str(tmp_path / "without"))
            await group.check_health()
        finally:
            await group.close(0)
        last = LocalGroup(CONFIG, ("upsampler_1024",))
        with pytest.raises(BundleError, match="upsampler_1024"):
            await last.load(str(tmp_path / "without"))

    asyncio.run(main())


def test_memory_that_is_too_little_brings_the_old_weights_back(tiny_bundle: str, other: str, monkeypatch) -> None:
    """Neither beside the old ones nor alone: those who ask meanwhile wait, and get the old ones."""

    async def main() -> None:
        old = Bundle.load(tiny_bundle).digest
        load, began, go_on, freed = Loader.load, asyncio.Event(), asyncio.Event(), list[bool]()
        loop = asyncio.get_running_loop()

        def too_large(self: Loader, bundle: Bundle, beside: Revision | None) -> Revision:
            if bundle.uri == tiny_bundle:
                return load(self, bundle, beside)
            if beside is None:
                freed.append(network() is None)
                loop.call_soon_threadsafe(began.set)
                asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(SOON)
            raise EngineError(f"{bundle.uri!r} does not fit into memory")

        async with serving(tiny_bundle) as (group, _, chain):
            before = await chain.draw(asked(1))
            network = weakref.ref(group._revisions.current.stages.networks["decoder"])
            monkeypatch.setattr(Loader, "load", too_large)
            loading = asyncio.create_task(group.load(other))
            async with asyncio.timeout(SOON):
                await began.wait()
            assert freed == [True]
            assert group._revisions.held == []
            await group.check_health()
            waiting = asyncio.create_task(group.generate(Call(asked(1), old)))
            await asyncio.sleep(0.02)
            assert not waiting.done()
            go_on.set()
            with pytest.raises(EngineError, match="does not fit"):
                await loading
            assert is_same(await waiting, before)
            assert group._revisions.current.digest == old
            await group.check_health()

    asyncio.run(main())


def test_memory_errors_of_a_device_are_told_as_such(tiny_bundle: str, monkeypatch) -> None:
    def out_of_memory(*args: object, **further: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("unclip.serving.stages.revisions.check_probe", out_of_memory)
    with pytest.raises(EngineError, match="does not fit into memory: CUDA out of memory"):
        Loader(CONFIG, STAGES, 0.8).load(Bundle.load(tiny_bundle), None)


def test_beside_another_one_it_takes_the_same_rows(tiny_bundle: str, other: str) -> None:
    """What is free beside one that is at work says nothing of what it will have."""

    async def main() -> None:
        revisions = Revisions(Loader(CONFIG.merged({"engine": {"memory_bytes": 2**24}}), STAGES, 0.8))
        try:
            await revisions.load(tiny_bundle)
            slots = revisions.current.slots
            assert slots["decoder"] == 3
            await revisions.load(other)
            assert revisions.current.slots == slots
        finally:
            await revisions.close(0)

    asyncio.run(main())


def test_what_is_under_way_may_end_before_it_is_closed(tiny_bundle: str) -> None:
    async def main() -> None:
        async with serving(tiny_bundle) as (group, _, chain):
            options = AS_IT_IS.merged({"up_to": 16, "decoder": {"num_inference_steps": 30}})
            drawing = asyncio.create_task(chain.draw(Request(image_embed=unit(1), options=options)))
            await until(lambda: group.metrics().running == 1)
            await group.close(SOON)
            assert (await drawing).images[16].shape == (16, 16, 3)

    asyncio.run(main())
