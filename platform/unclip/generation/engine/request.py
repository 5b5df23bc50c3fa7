"""What the engine is asked for, and what it answers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.known import KnownPixels
from unclip.pipelines.stages import StageName

Picture = npt.NDArray[np.uint8]
End = Literal["finished", "failed", "cancelled", "expired"]


class EngineError(RuntimeError):
    """The engine could not do what it was asked for."""


class EngineFullError(EngineError):
    """As many requests wait as may wait; ask again later."""


class EngineStoppedError(EngineError):
    """The engine no longer runs."""


class StageFailedError(EngineError):
    """A stage failed while this request was in its batch; the cause is its `__cause__`."""


class DeadlineError(TimeoutError):
    """The request was not done in the time that it had."""


@dataclass(frozen=True)
class Update:
    """A request has gone one step further; `steps` of `total` in `stage`, of all draws of the prior together."""

    stage: StageName
    steps: int
    total: int
    picture: Callable[[], Picture | None]
    """What the picture looks like now, uint8 (S, S, 3); None in the prior. It is computed when it is called, which is for `watch`
    alone: the next step changes it."""


@dataclass(frozen=True)
class EncodedCaption:
    """What CLIP makes of a caption: (D,) z_t of unit norm, and (L, S) states of its tokens where a stage is told them."""

    text_embed: torch.Tensor
    text_states: torch.Tensor | None = None


@dataclass(frozen=True)
class Request:
    """One picture.

    It begins at the prior; with `image_embed` at the decoder; with `low_res` at the upsampler that takes its size; with
    `inverts` it goes the decoder's way backwards.
    """

    prompt: str | None = None
    """The caption, or the class for a decoder of classes; None where z_i alone shall say what to draw."""

    negative_prompt: str | None = None
    """What classifier-free guidance leads away from, in prior and decoder, in place of no caption at all."""

    encoded: EncodedCaption | None = None
    """Of `prompt`; None: the engine's own CLIP makes it."""

    negative_encoded: EncodedCaption | None = None
    """Of `negative_prompt`; None: the engine's own CLIP makes it."""

    stages: tuple[StageName, ...] | None = None
    """Those of the picture's way that shall be gone here, in their order; None for all. A decoder that comes first and is
    given no `image_embed` sees none."""

    inverts: Picture | None = None
    """uint8 (S, S, 3) of the decoder's size, with `image_embed`: what is wanted is the noise that leads back to it."""

    seed: int = 0
    """All randomness of the picture; it fits into 64 signed bits."""

    image_embed: torch.Tensor | None = None
    """(D,) z_i of unit norm."""

    low_res: Picture | None = None
    """uint8 (s, s, 3)."""

    options: GenerationOptions = field(default_factory=GenerationOptions)
    """How the stages sample, and the largest picture that is wanted."""

    x_T: torch.Tensor | None = None
    """(3, S, S) that the decoder begins from; None: drawn from the seed."""

    known: Mapping[int, KnownPixels] = field(default_factory=dict)
    """By the side of a stage's picture what it shall show, each of one picture, as `known_at` makes them."""

    timeout: float | None = None
    """Seconds from its submission after which nobody waits for it any more."""

    watch: Callable[[Update], None] | None = None
    """Called by the engine after each step; keep it short. What it raises ends this request alone."""


@dataclass(frozen=True)
class Result:
    """What came out of a request."""

    image_embed: torch.Tensor | None
    """(D,) float32 z_i of unit norm; None where the decoder was told none, or the request began behind it."""

    images: Mapping[int, Picture]
    """uint8 (S, S, 3) for each side S that was made."""

    x_T: torch.Tensor | None
    """(3, S, S) the noise of an inversion; None where none was asked for."""

    seed: int
    settings: Mapping[str, Any]
    """Plain JSON values: what changes the picture beside bundle, prompt, seed and precision."""

    queue_seconds: float
    """From its submission to its first step."""

    seconds: float
    """From its submission to its end."""


class Ticket(Future[Result]):
    """A request that was submitted; safe to use from any thread.

    `result(timeout)` waits. It raises `StageFailedError`, `DeadlineError`, `EngineStoppedError`, what `Request.watch`
    raised, `CancelledError`, or `TimeoutError` where `timeout` seconds were not enough for an answer. `cancel()` works
    until there is one; its slots are free before the engine's next step. `asyncio.wrap_future` makes it awaitable.
    """

    def __init__(self, request: Request) -> None:
        super().__init__()
        self.request = request
        self.begun = threading.Event()
        """Set when the request takes its first step, or ends without one."""
        self.add_done_callback(_tell_who_waits)

    @property
    def end(self) -> End:
        """How it ended; it has."""
        if self.cancelled():
            return "cancelled"
        error = self.exception(0)
        return "finished" if error is None else "expired" if isinstance(error, DeadlineError) else "failed"

    def answer(self, result: Result) -> None:
        """Ends with `result`, unless it has ended before."""
        with contextlib.suppress(InvalidStateError):
            self.set_result(result)

    def fail(self, error: BaseException) -> None:
        """Ends with `error`, unless it has ended before."""
        with contextlib.suppress(InvalidStateError):
            self.set_exception(error)


def _tell_who_waits(ticket: Future[Result]) -> None:
    """`cancel` by itself leaves `concurrent.futures.wait` and `as_completed` waiting for whoever takes the work up."""
    if ticket.cancelled():
        ticket.set_running_or_notify_cancel()
