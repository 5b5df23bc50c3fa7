"""CLIP for concurrent callers: everybody gets their own, what waits goes through together, and every future ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from unclip.generation.engine.request import EngineFullError, EngineStoppedError, StageFailedError
from unclip.models.clip import ClipModel
from unclip.serving.stages.encoder import ClipEncoder

SOON = 60.0


class CountedClip:
    """A CLIP that counts the rows of its calls, and that stops before the first until it is let go."""

    def __init__(self, clip: ClipModel) -> None:
        self.clip, self.embed_dim = clip, clip.embed_dim
        self.texts: list[int] = []
        self.pictures: list[int] = []
        self.reached, self.open = threading.Event(), threading.Event()
        self.error: BaseException | None = None

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        return self.clip.tokenize(texts)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        self.texts.append(len(tokens))
        self._gate()
        return self.clip.encode_text(tokens)

    def encode_text_states(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.texts.append(len(tokens))
        return self.clip.encode_text_states(tokens)

    def encode_image(self, pictures: np.ndarray, *, unit_norm: bool = True) -> torch.Tensor:
        self.pictures.append(len(pictures))
        return self.clip.encode_image(pictures, unit_norm=unit_norm)

    def _gate(self) -> None:
        self.reached.set()
        assert self.open.wait(SOON)
        if self.error is not None:
            raise self.error


@pytest.fixture
def clip(tiny_models: dict[str, nn.Module]) -> CountedClip:
    return CountedClip(tiny_models["clip"])


@pytest.fixture
def encoder(clip: CountedClip) -> Iterator[ClipEncoder]:
    made = ClipEncoder(clip)
    yield made
    clip.open.set()
    made.close()


def pictures_of(count: int, side: int = 16) -> list[np.ndarray]:
    return list(np.random.default_rng(side).integers(0, 256, (count, side, side, 3), dtype=np.uint8))


def held(clip: CountedClip, encoder: ClipEncoder) -> Future:
    """A first call that is under way."""
    first = encoder.texts(["the first"])
    assert clip.reached.wait(SOON)
    return first


def test_everybody_gets_their_own_and_what_waits_goes_together(clip: CountedClip, encoder: ClipEncoder) -> None:
    first = held(clip, encoder)
    texts = [[f"drawing {caller}", "the same for all"] for caller in range(5)]
    pictures = [pictures_of(2), pictures_of(1, side=32), pictures_of(3)]
    asked_texts = [encoder.texts(each) for each in texts]
    asked_pictures = [encoder.pictures(each) for each in pictures]
    clip.open.set()
    assert len(first.result(SOON)) == 1
    for each, future in zip(texts, asked_texts, strict=True):
        found = torch.stack([caption.text_embed for caption in future.result(SOON)])
        torch.testing.assert_close(found, clip.clip.encode_text(clip.tokenize(each)))
    for each, future in zip(pictures, asked_pictures, strict=True):
        torch.testing.assert_close(future.result(SOON), clip.clip.encode_image(np.stack(each)))
    assert clip.texts == [1, 6]
    assert sorted(clip.pictures) == [1, 5]


def test_captions_are_encoded_once(clip: CountedClip, encoder: ClipEncoder) -> None:
    clip.open.set()
    before = encoder.texts(["a", "b"]).result(SOON)
    after = encoder.texts(["b", "c", "a", "a"]).result(SOON)
    assert clip.texts == [2, 1]
    assert [torch.equal(after[row].text_embed, before[of].text_embed) for row, of in ((0, 1), (2, 0), (3, 0))] == [
        True
    ] * 3


def test_many_go_through_in_calls_of_bounded_size(clip: CountedClip, encoder: ClipEncoder) -> None:
    clip.open.set()
    texts = [f"drawing {number}" for number in range(300)]
    found = encoder.texts(texts).result(SOON)
    expected = clip.clip.encode_text(clip.tokenize(texts))
    torch.testing.assert_close(torch.stack([caption.text_embed for caption in found]), expected)
    assert max(clip.texts) <= 64
    assert len(encoder.pictures(pictures_of(130)).result(SOON)) == 130
    assert max(clip.pictures) <= 64


def test_states_come_with_captions_where_they_are_wanted(clip: CountedClip) -> None:
    encoder = ClipEncoder(clip, with_states=True)
    try:
        texts = ["a red heart", "two dogs"]
        embeds, states = clip.clip.encode_text_states(clip.tokenize(texts))
        found = encoder.texts(texts).result(SOON)
        torch.testing.assert_close(torch.stack([caption.text_embed for caption in found]), embeds)
        torch.testing.assert_close(torch.stack([caption.text_states for caption in found]), states)
    finally:
        encoder.close()


def test_pictures_keep_their_norm_where_the_decoder_counts_it(clip: CountedClip) -> None:
    encoder = ClipEncoder(clip, unit_norm=False)
    try:
        pictures = pictures_of(3)
        expected = clip.clip.encode_image(np.stack(pictures), unit_norm=False)
        assert (expected.norm(dim=1) - 1).abs().min() > 1e-3
        torch.testing.assert_close(encoder.pictures(pictures).result(SOON), expected)
    finally:
        encoder.close()


def test_nothing_asked_is_nothing_answered(encoder: ClipEncoder, clip: CountedClip) -> None:
    clip.open.set()
    assert encoder.texts([]).result(SOON) == []
    assert encoder.pictures([]).result(SOON).shape == (0, clip.embed_dim)
    with pytest.raises(ValueError, match="uint8"):
        encoder.pictures([np.zeros((16, 8, 3), dtype=np.uint8)])


def test_who_gave_up_is_left_out(clip: CountedClip, encoder: ClipEncoder) -> None:
    first = held(clip, encoder)
    given_up, kept = encoder.texts(["nobody wants this"]), encoder.texts(["somebody wants this"])
    assert given_up.cancel()
    clip.open.set()
    assert first.result(SOON)
    assert kept.result(SOON)
    assert clip.texts == [1, 1]


def test_an_error_ends_its_call_alone(clip: CountedClip, encoder: ClipEncoder) -> None:
    clip.error = FloatingPointError("not finite")
    first = held(clip, encoder)
    clip.open.set()
    with pytest.raises(StageFailedError, match="stage clip failed: not finite") as failure:
        first.result(SOON)
    assert failure.value.__cause__ is clip.error
    clip.error = None
    assert encoder.texts(["the next"]).result(SOON)
    assert encoder.is_alive


def test_a_dead_thread_ends_all_and_takes_nothing_on(clip: CountedClip, encoder: ClipEncoder) -> None:
    clip.error = SystemExit("gone")
    first, waiting = held(clip, encoder), encoder.texts(["another"])
    alive: list[bool] = []
    for future in (first, waiting):
        future.add_done_callback(lambda _: alive.append(encoder.is_alive))
    clip.open.set()
    for future in (first, waiting):
        with pytest.raises(EngineStoppedError, match="thread died"):
            future.result(SOON)
    assert alive == [False, False]
    assert not encoder.is_alive
    with pytest.raises(EngineStoppedError):
        encoder.texts(["late"])


def test_a_call_that_lasts_is_seen_and_closing_ends_what_waits(clip: CountedClip) -> None:
    encoder = ClipEncoder(clip)
    held(clip, encoder)
    waiting = encoder.texts(["another"])
    assert encoder.call_seconds > 0
    with ThreadPoolExecutor(1) as threads:
        closing = threads.submit(encoder.close)
        with pytest.raises(EngineStoppedError, match="closed"):
            waiting.result(SOON)
        clip.open.set()
        closing.result(SOON)
    assert encoder.call_seconds == 0


def test_more_than_may_wait_are_refused(clip: CountedClip, encoder: ClipEncoder) -> None:
    held(clip, encoder)
    encoder.texts([f"drawing {number}" for number in range(1000)])
    with pytest.raises(EngineFullError, match="1000 captions and pictures wait"):
        encoder.texts([f"further drawing {number}" for number in range(100)])
