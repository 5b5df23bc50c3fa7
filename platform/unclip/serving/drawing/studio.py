"""What an order needs to be prepared and drawn: the chain, the policy, and the time that is left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

import torch

from unclip.data.decode import Picture
from unclip.generation.engine.request import Request, Result
from unclip.serving.errors import TimedOut
from unclip.serving.groups import Shown
from unclip.serving.guards.policy import Policy
from unclip.serving.guards.uploads import Upload, read_picture
from unclip.serving.stages.chain import Chain


@dataclass(frozen=True)
class Studio:
    """For one API request.

    Args:
        max_pixels: of an uploaded picture.
        ends: time of the event loop at which the request is given up.
    """

    chain: Chain
    policy: Policy
    max_pixels: int
    ends: float

    async def read(self, content: bytes, field: str) -> Upload:
        """A picture that came in `field`; raises as `read_picture` does."""
        return await asyncio.to_thread(read_picture, content, field=field, max_pixels=self.max_pixels)

    async def text_embeds(self, texts: Sequence[str]) -> torch.Tensor:
        """z_t (N, D) of unit norm."""
        return torch.stack([encoded.text_embed for encoded in await self.chain.encode_texts(texts)]).float().cpu()

    async def picture_embeds(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """z_i (N, D) of unit norm, of squares uint8 (S, S, 3) which may be of different sizes."""
        found = await asyncio.gather(*(self.chain.encode_pictures([picture]) for picture in pictures))
        return torch.cat(found)

    async def draw(self, request: Request) -> Result:
        """What the stages make of it, in the time that is left."""
        return await self.chain.draw(self._timed(request))

    async def watch(self, request: Request, previews: Sequence[float]) -> AsyncGenerator[Shown | Result, None]:
        """The same step by step, with previews at these shares of each stage's way."""
        async with aclosing(self.chain.watch(self._timed(request), previews)) as steps:
            async for step in steps:
                yield step

    def _timed(self, request: Request) -> Request:
        left = self.ends - asyncio.get_running_loop().time()
        if left <= 0:
            raise TimedOut("the request was not done in its time")
        return replace(request, timeout=left)
