"""The seam between the API and the engines: groups of stages, in this process or in others."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from unclip.generation.engine.request import EncodedCaption, Picture, Request, Result
from unclip.pipelines.stages import StageName
from unclip.serving.context import Context


class UnknownRevisionError(RuntimeError):
    """A group has no weights of the bundle that it was asked to use: not any more, or not yet."""


class GroupUnavailableError(RuntimeError):
    """No process of the group answers; asking again may find one."""


@dataclass(frozen=True)
class Call:
    """A part of a picture's way through the stages. The same call makes the same again, so it may be repeated.

    Args:
        request: for the stages of this group; its `watch` is None.
        revision: digest of the bundle whose weights it shall use.
        context: of the API request that it belongs to.
    """

    request: Request
    revision: str
    context: Context = field(default_factory=Context)


@dataclass(frozen=True)
class Shown:
    """How far a picture is: `steps` of `total` in `stage`, and what it looks like, uint8 (S, S, 3), where that was asked for."""

    stage: StageName
    steps: int
    total: int
    picture: Picture | None = None


class StageGroup(Protocol):
    """Some of a bundle's stages, loaded somewhere. Who stops waiting for an answer has ended the work for it.

    All raise `UnknownRevisionError`, `GroupUnavailableError`, what `EngineThread.submit` raises, and what a `Ticket` does.
    """

    async def generate(self, call: Call) -> Result:
        """What the group's stages make of a request."""
        ...

    def watch(self, call: Call, previews: Sequence[float]) -> AsyncGenerator[Shown | Result, None]:
        """As `generate`, with every step on the way, and the result last.

        Args:
            previews: shares of the way through each stage, ascending, at which the picture is shown too.
        """
        ...

    async def encode_texts(self, texts: Sequence[str], revision: str) -> list[EncodedCaption]:
        """What the stages are told of captions, by the group's CLIP."""
        ...

    async def encode_pictures(self, pictures: Sequence[Picture], revision: str) -> torch.Tensor:
        """z_i (B, D) float32 of unit norm, on the CPU, of pictures uint8 (S, S, 3), by the group's CLIP."""
        ...
