"""CLIP at work for concurrent callers: what waits is encoded together, in a thread of its own."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from unclip.generation.engine.request import (
    EncodedCaption,
    EngineFullError,
    EngineStoppedError,
    Picture,
    StageFailedError,
)
from unclip.models.clip import ClipModel

_AT_ONCE = 64
"""Captions, and pictures, of one call of the network."""
_WAITING = 1024
_KEPT = 256
"""Captions whose encodings are kept: those with a text encoder's states are about 200 kB each."""
_LAST_CALL_SECONDS = 10.0


@dataclass(frozen=True, eq=False)
class _Job:
    """What a caller wants encoded: captions or pictures."""

    texts: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    answer: Future[Any] = field(default_factory=Future)

    def __len__(self) -> int:
        return len(self.texts) + len(self.pictures)


class ClipEncoder:
    """Encodes captions and pictures of concurrent callers. Whatever happens, every future ends.

    Futures raise `StageFailedError` where the network did, and `EngineStoppedError` where the thread is no more.

    Args:
        clip: on its device.
        with_states: captions get the states of their tokens too.
        unit_norm: whether the embeddings of pictures have unit norm, see `ClipModel.encode_image`.
    """

    def __init__(self, clip: ClipModel, *, with_states: bool = False, unit_norm: bool = True) -> None:
        self._clip, self._with_states, self._unit_norm = clip, with_states, unit_norm
        self._kept: OrderedDict[str, EncodedCaption] = OrderedDict()
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._end: EngineStoppedError | None = None
        self._began: float | None = None
        self._thread = threading.Thread(target=self._work, name="unclip-clip", daemon=True)
        self._thread.start()

    def texts(self, texts: Sequence[str]) -> Future[list[EncodedCaption]]:
        """z_t of captions, on the CPU. Raises `EngineFullError` where too much waits already."""
        return self._queued(_Job(texts=tuple(texts)))

    def pictures(self, pictures: Sequence[Picture]) -> Future[torch.Tensor]:
        """z_i (B, D) of pictures uint8 (S, S, 3), on the CPU. Raises `EngineFullError` where too much waits already."""
        for picture in pictures:
            if picture.dtype != np.uint8 or picture.shape != (len(picture), len(picture), 3):
                raise ValueError(f"pictures must be uint8 (S, S, 3), not {picture.dtype} {picture.shape}")
        if not pictures:
            none: Future[torch.Tensor] = Future()
            none.set_result(torch.empty(0, self._clip.embed_dim))
            return none
        return self._queued(_Job(pictures=tuple(pictures)))

    @property
    def is_alive(self) -> bool:
        """Whether anything is taken on."""
        return self._end is None

    @property
    def call_seconds(self) -> float:
        """How long the call that is under way has taken up to now: a device that hangs shows here. 0 between calls."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def close(self) -> None:
        """Ends what waits; a call that does not end soon is left to itself."""
        self._stop(EngineStoppedError("the CLIP encoder was closed"))
        self._thread.join(_LAST_CALL_SECONDS)

    def _queued(self, job: _Job) -> Future[Any]:
        with self._changed:
            if self._end is not None:
                raise self._end
            waiting = sum(map(len, self._waiting))
            if waiting and waiting + len(job) > _WAITING:
                raise EngineFullError(f"{waiting} captions and pictures wait to be encoded already")
            self._waiting.append(job)
            self._changed.notify_all()
        return job.answer

    def _work(self) -> None:
        try:
            while jobs := self._next_jobs():
                self._began = time.monotonic()
                self._answer(jobs)
                self._began = None
        except BaseException as error:
            self._stop(_died_of(error))
        finally:
            self._began = None

    def _next_jobs(self) -> list[_Job]:
        """Those that waited longest, as many as one call takes, and at least one; none when it is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._end is not None)
            jobs: list[_Job] = []
            while self._waiting and (not jobs or sum(map(len, jobs)) + len(self._waiting[0]) <= _AT_ONCE):
                jobs.append(self._waiting.popleft())
            return jobs

    def _answer(self, jobs: Sequence[_Job]) -> None:
        jobs = [job for job in jobs if job.answer.set_running_or_notify_cancel()]
        try:
            captions = self._captions([text for job in jobs for text in job.texts])
            embeds = iter(self._embeds([picture for job in jobs for picture in job.pictures]))
            for job in jobs:
                rows = [next(embeds) for _ in job.pictures]
                job.answer.set_result(torch.stack(rows) if rows else [captions[text] for text in job.texts])
        except Exception as error:
            failure = StageFailedError(f"stage clip failed: {error}")
            failure.__cause__ = error
            for job in jobs:
                _fail(job, failure)
        except BaseException as error:
            end = _died_of(error)
            self._stop(end)  # first: who hears of it finds the encoder dead
            for job in jobs:
                _fail(job, end)
            raise

    def _captions(self, texts: Sequence[str]) -> dict[str, EncodedCaption]:
        """Of each of `texts`; the last ones of all callers are kept."""
        wanted = dict.fromkeys(texts)
        new = [text for text in wanted if text not in self._kept]
        for begin in range(0, len(new), _AT_ONCE):
            self._kept.update(self._encoded(new[begin : begin + _AT_ONCE]))
        found = {}
        for text in wanted:
            found[text] = self._kept[text]
            self._kept.move_to_end(text)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return found

    def _encoded(self, texts: Sequence[str]) -> dict[str, EncodedCaption]:
        tokens = self._clip.tokenize(texts)
        if not self._with_states:
            embeds = self._clip.encode_text(tokens).cpu()
            return {text: EncodedCaption(embed.clone()) for text, embed in zip(texts, embeds, strict=True)}
        embeds, states = (part.cpu() for part in self._clip.encode_text_states(tokens))
        return {
            text: EncodedCaption(embed.clone(), state.clone())  # a view would keep the whole call's
            for text, embed, state in zip(texts, embeds, states, strict=True)
        }

    def _embeds(self, pictures: Sequence[Picture]) -> list[torch.Tensor]:
        """(D,) of each; those of one size go through the network together."""
        found: dict[int, torch.Tensor] = {}
        for side in {picture.shape[0] for picture in pictures}:
            numbers = [number for number, picture in enumerate(pictures) if picture.shape[0] == side]
            for begin in range(0, len(numbers), _AT_ONCE):
                part = numbers[begin : begin + _AT_ONCE]
                stacked = np.stack([pictures[number] for number in part])
                embeds = self._clip.encode_image(stacked, unit_norm=self._unit_norm).cpu()
                found.update(zip(part, embeds, strict=True))
        return [found[number] for number in range(len(pictures))]

    def _stop(self, end: EngineStoppedError) -> None:
        with self._changed:
            self._end = self._end or end
            left, self._waiting = list(self._waiting), deque()
            self._changed.notify_all()
        for job in left:
            _fail(job, self._end)


def _died_of(error: BaseException) -> EngineStoppedError:
    end = EngineStoppedError(f"the CLIP encoder's thread died: {error!r}")
    end.__cause__ = error
    return end


def _fail(job: _Job, error: BaseException) -> None:
    with contextlib.suppress(InvalidStateError):  # it was answered, or given up
        job.answer.set_exception(error)
