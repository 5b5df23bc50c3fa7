"""How well pictures fit their prompts: the cosine of CLIP's two embeddings, computed beside the engine."""

from __future__ import annotations

import copy
import math
import queue
import threading
from concurrent.futures import Future
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from unclip.data.decode import Picture
from unclip.generation.engine.request import EngineStoppedError
from unclip.models.clip import ClipModel

_MOST_PICTURES = 32
_MOST_PIXELS = 8 * 1024 * 1024
"""Of the pictures that are scored together: 100 MB of floats on the device."""


class _Waiting(NamedTuple):
    prompt: str
    picture: Picture
    score: Future[float]


class Scorer:
    """Scores in a thread of its own those pictures together that wait together; safe to use from any thread.

    Args:
        clip: on its device; it may be at work elsewhere at the same time.
    """

    def __init__(self, clip: ClipModel) -> None:
        # Modules of its own around the same weights: the engine hangs hooks on its CLIP while it encodes captions.
        shared = chain(clip.parameters(), clip.buffers())
        self._clip = copy.deepcopy(clip, {id(tensor): tensor for tensor in shared})
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="unclip-scorer", daemon=True)
        self._thread.start()

    def score(self, prompt: str, picture: Picture) -> Future[float]:
        """In [-1, 1], of a uint8 (S, S, 3) picture; the future raises what CLIP raises."""
        future: Future[float] = Future()
        with self._lock:
            if self._is_closed:
                future.set_exception(EngineStoppedError("the scorer was closed"))
            else:
                self._queue.put(_Waiting(prompt, picture, future))
        return future

    def close(self) -> None:
        """Ends the thread once everything is scored that waits."""
        with self._lock:
            self._is_closed = True
            self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        held: _Waiting | None = None
        while (first := held or self._queue.get()) is not None:
            together, held, is_over = self._together(first)
            try:
                scores = clip_scores(
                    self._clip, [item.prompt for item in together], np.stack([item.picture for item in together])
                )
            except Exception as error:
                for item in together:
                    item.score.set_exception(error)
            else:
                for item, score in zip(together, scores, strict=True):
                    _answer(item.score, score)
            if is_over:
                return

    def _together(self, first: _Waiting) -> tuple[list[_Waiting], _Waiting | None, bool]:
        """What waits and has the first one's size, then one that has not, and whether that was all there will be."""
        most = min(_MOST_PICTURES, max(1, _MOST_PIXELS // (first.picture.shape[0] * first.picture.shape[1])))
        together = [first]
        while len(together) < most:
            try:
                following = self._queue.get_nowait()
            except queue.Empty:
                break
            if following is None:
                return together, None, True
            if following.picture.shape != first.picture.shape:
                return together, following, False
            together.append(following)
        return together, None, False


def _answer(future: Future[float], score: float) -> None:
    if math.isfinite(score):
        future.set_result(score)
    else:
        future.set_exception(ValueError(f"CLIP's score is {score}"))


@torch.no_grad()
def clip_scores(clip: ClipModel, prompts: list[str], pictures: Picture) -> list[float]:
    """The cosine of CLIP's embeddings of each prompt and its picture, uint8 (B, S, S, 3)."""
    captions = list(dict.fromkeys(prompts))
    texts = clip.encode_text(clip.tokenize(captions))
    rows = torch.tensor([captions.index(prompt) for prompt in prompts], device=texts.device)
    scores: list[float] = (clip.encode_image(pictures) * texts[rows]).sum(dim=1).tolist()
    return scores
