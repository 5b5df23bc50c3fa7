"""The content policy, with a real CLIP behind the concepts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from tests.support.bundles import save_tiny_bundle

from unclip.config.base import ConfigError
from unclip.data.decode import Picture
from unclip.models.clip import ClipModel
from unclip.pipelines.bundle import Bundle, ClipReference, save_stage
from unclip.serving.config import ConceptConfig, PolicyConfig, ServeConfig
from unclip.serving.errors import ContentRefused
from unclip.serving.guards.audit import Audit
from unclip.serving.guards.policy import Finding, Policy
from unclip.serving.stages.chain import Chain
from unclip.serving.stages.group import LocalGroup
from unclip.serving.stages.model import Model, Models

T = TypeVar("T")
CAPTIONS = ("a knife", "a gun", "a naked person")
PROMPTS = ("a red heart", "a knife in a drawer")
PICTURES: list[Picture] = list(np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8))


class Server:
    """A chain of one group that holds CLIP alone."""

    def __init__(self, uri: str) -> None:
        config = ServeConfig(bundle=uri)
        self.group = LocalGroup(config, ("clip",))
        self.models = Models(Model.load(uri, config.options))
        self.chain = Chain([(("clip",), self.group)], self.models)

    async def use(self, uri: str) -> None:
        await self.group.load(uri)
        self.models.use(Model.load(uri, ServeConfig().options))


def served(uri: str, work: Callable[[Server], Awaitable[T]]) -> T:
    """What `work` does with a running server."""

    async def run() -> T:
        server = Server(uri)
        await server.use(uri)
        try:
            return await work(server)
        finally:
            await server.group.close(5)

    return asyncio.run(run())


def cosines(uri: str, rows: Callable[[ClipModel], torch.Tensor]) -> torch.Tensor:
    """(N, T) by the bundle's CLIP alone, of `rows` (N, D) and the captions."""
    clip = Bundle.load(uri).load_clip()
    with torch.no_grad():
        return rows(clip) @ clip.encode_text(clip.tokenize(CAPTIONS)).T


def of_prompts(uri: str, prompts: Sequence[str] = PROMPTS) -> torch.Tensor:
    return cosines(uri, lambda clip: clip.encode_text(clip.tokenize(prompts)))


def of_pictures(uri: str) -> torch.Tensor:
    return cosines(uri, lambda clip: clip.encode_image(np.stack(PICTURES)))


def policy_of(*concepts: ConceptConfig, **fields: Any) -> PolicyConfig:
    return PolicyConfig(concepts=concepts, **fields)


def save_with_another_clip(uri: str, other: str) -> None:
    """The bundle `uri` as one that was trained in another space."""
    bundle = Bundle.load(uri)
    torch.manual_seed(1)
    clip = bundle.configs["clip"].build()
    for parameter in clip.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    reference = ClipReference(source="clip", fingerprint=str(clip.fingerprint))
    for name, config in bundle.configs.items():
        model = clip if name == "clip" else bundle.load_model(name)
        own = None if name.startswith("upsampler") else reference
        save_stage(other, config, tensors=model.state_dict(), clip=own, provenance={})


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The audit lines."""
    return [record.unclip_fields for record in caplog.records if record.getMessage() == "policy_refused"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("margin", "is_refused"), [(-1e-4, True), (1e-4, False)])
def test_prompts_are_refused_from_their_threshold_on(
    tiny_bundle: str, margin: float, is_refused: bool, caplog: pytest.LogCaptureFixture
) -> None:
    scores = of_prompts(tiny_bundle)[:, :2].amax(dim=1)
    config = policy_of(ConceptConfig(name="weapons", texts=CAPTIONS[:2], prompt_threshold=float(scores.max()) + margin))

    async def work(server: Server) -> None:
        policy = Policy.build(config, server.chain)
        assert not policy.checks_pictures
        await policy.check_pictures(PICTURES)
        await policy.check_prompts([])
        await policy.check_prompts(PROMPTS)

    with caplog.at_level(logging.INFO, "unclip.serving"):
        if not is_refused:
            served(tiny_bundle, work)
            assert lines(caplog) == []
            return
        with pytest.raises(ContentRefused, match="the prompt is refused by the content policy") as caught:
            served(tiny_bundle, work)
    assert (caught.value.status, caught.value.code) == (400, "content_policy_violation")
    (line,) = lines(caplog)
    assert (line["hook"], line["rule"], line["where"]) == ("concepts", "weapons", "prompt")
    assert line["score"] == pytest.approx(float(scores.max()), abs=1e-4)
    assert not any(text in str(line) + caught.value.message for text in (*PROMPTS, *CAPTIONS, "weapons' "))
    assert "weapons" not in caught.value.message


@pytest.mark.parametrize(("margin", "is_refused"), [(-1e-4, True), (1e-4, False)])
def test_pictures_are_refused_from_their_threshold_on(
    tiny_bundle: str, margin: float, is_refused: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Each concept has its own captions and threshold: the first one here is far away from all."""
    likeness = of_pictures(tiny_bundle)
    score = float(likeness[:, 2].max())
    config = policy_of(
        ConceptConfig(name="weapons", texts=CAPTIONS[:2], picture_threshold=float(likeness.max()) + 0.01),
        ConceptConfig(name="nudity", texts=CAPTIONS[2:], picture_threshold=score + margin),
    )

    async def work(server: Server) -> None:
        policy = Policy.build(config, server.chain)
        assert policy.checks_pictures
        await policy.check_prompts([*PROMPTS, *CAPTIONS])
        await policy.check_pictures([])
        await policy.check_pictures(PICTURES)

    with caplog.at_level(logging.INFO, "unclip.serving"):
        if not is_refused:
            served(tiny_bundle, work)
            return
        with pytest.raises(ContentRefused, match="a picture that was made is refused"):
            served(tiny_bundle, work)
    (line,) = lines(caplog)
    assert (line["rule"], line["where"]) == ("nudity", "picture")
    assert line["score"] == pytest.approx(score, abs=1e-4)
    assert "prompt_hmac" not in line


def test_given_pictures_are_told_apart(tiny_bundle: str, caplog: pytest.LogCaptureFixture) -> None:
    config = policy_of(ConceptConfig(name="all", texts=CAPTIONS, picture_threshold=-1))

    async def work(server: Server) -> None:
        await Policy.build(config, server.chain).check_pictures(PICTURES, given=True)

    with (
        caplog.at_level(logging.INFO, "unclip.serving"),
        pytest.raises(ContentRefused, match="a picture of the request"),
    ):
        served(tiny_bundle, work)
    assert lines(caplog)[0]["where"] == "given picture"


def test_new_weights_look_with_their_own_eyes(tiny_bundle: str, tmp_path: Path) -> None:
    """The threshold lies between the two CLIPs' scores of the same prompt."""
    other = str(tmp_path / "other")
    save_with_another_clip(tiny_bundle, other)
    scores = {uri: float(of_prompts(uri, PROMPTS[:1]).max()) for uri in (tiny_bundle, other)}
    low, high = sorted(scores, key=lambda uri: scores[uri])
    assert scores[high] - scores[low] > 0.01
    threshold = (scores[high] + scores[low]) / 2
    config = policy_of(ConceptConfig(name="any", texts=CAPTIONS, prompt_threshold=threshold))

    async def work(server: Server) -> None:
        policy = Policy.build(config, server.chain)
        await policy.check_prompts(PROMPTS[:1])
        await server.use(high)
        with pytest.raises(ContentRefused):
            await policy.check_prompts(PROMPTS[:1])
        await server.use(low)
        await policy.check_prompts(PROMPTS[:1])

    served(low, work)


def test_a_blocklist_names_the_line_and_not_the_word(
    tiny_bundle: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "list.txt"
    file.write_text("# ours\nbad thing\n")

    async def work(server: Server) -> None:
        policy = Policy.build(policy_of(blocklist=str(file), audit_prompts=True), server.chain)
        await policy.check_prompts(["a good thing", "a bad one"])
        await policy.check_prompts(["a good thing", "a b.a.d thing"])

    refused = pytest.raises(ContentRefused, match="contains a word or phrase that is not allowed")
    with caplog.at_level(logging.INFO, "unclip.serving"), refused as caught:
        served(tiny_bundle, work)
    assert "bad" not in caught.value.message
    (line,) = lines(caplog)
    assert (line["hook"], line["rule"], line["text"]) == ("blocklist", "line 2", "a b.a.d thing")


def test_nothing_configured_refuses_nothing(tiny_bundle: str) -> None:
    async def work(server: Server) -> None:
        policy = Policy.build(PolicyConfig(), server.chain)
        assert not policy.checks_pictures
        await policy.check_prompts(PROMPTS)
        await policy.check_pictures(PICTURES)

    served(tiny_bundle, work)


def test_concepts_need_a_clip(tmp_path: Path) -> None:
    uri = str(tmp_path / "bundle")
    save_tiny_bundle(uri)
    server = Server(uri)
    without = Model(Bundle(uri, {}, {}), server.models.current.options, (16,), 0)
    chain = Chain([(("clip",), server.group)], Models(without))
    concept = ConceptConfig(name="any", texts=CAPTIONS, prompt_threshold=0)
    with pytest.raises(ConfigError, match=r"policy\.concepts: the bundle has no CLIP"):
        Policy.build(policy_of(concept), chain)


class Curfew:
    """As an operator adds one."""

    name = "curfew"

    async def check_prompts(self, texts: Sequence[str]) -> Finding | None:
        return next((Finding("night", "it is late", index) for index, text in enumerate(texts) if "moon" in text), None)


class Dark:
    name = "dark"

    async def check_pictures(self, pictures: Sequence[Picture]) -> Finding | None:
        return Finding("dark", "it is dark", 0, 1.0) if pictures[0].mean() < 10 else None


class Broken:
    name = "broken"

    async def check_prompts(self, texts: Sequence[str]) -> Finding | None:
        raise ConnectionError(f"{len(texts)} texts could not be checked")


def test_hooks_of_ones_own(caplog: pytest.LogCaptureFixture) -> None:
    policy = Policy([Curfew()], [Dark()], audit=Audit(prompts=False))
    assert policy.checks_pictures
    with caplog.at_level(logging.INFO, "unclip.serving"):
        asyncio.run(policy.check_prompts(["the sun"]))
        asyncio.run(policy.check_pictures([np.full((4, 4, 3), 200, np.uint8)]))
        with pytest.raises(ContentRefused, match="it is late"):
            asyncio.run(policy.check_prompts(["the sun", "the moon"]))
        with pytest.raises(ContentRefused, match="it is dark"):
            asyncio.run(policy.check_pictures([np.zeros((4, 4, 3), np.uint8)]))
    assert [line["rule"] for line in lines(caplog)] == ["night", "dark"]


def test_nothing_passes_a_broken_hook() -> None:
    with pytest.raises(ConnectionError):
        asyncio.run(Policy([Broken()], [], audit=Audit(prompts=False)).check_prompts(["the sun"]))
