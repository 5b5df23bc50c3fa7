"""The shapes that are measured, one table for every side.

Imported in the peers' environments too, so it knows nothing but the standard library. Sizes: `cpu` is the paper's networks
scaled to a second or so a step on two cores, `gpu` the `small` recipes, `tiny` is for the tests. The peers' modules begin
where a caption's states are known, so text encoders are left out on every side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Batch(NamedTuple):
    """Samples of a step, and their side length in pixels; 0 for embeddings."""

    samples: int
    pixels: int


@dataclass(frozen=True)
class UNetShape:
    """A decoder or upsampler; level i is `channels * channel_mult[i]` wide, heads are 64 wide or a whole narrow level.

    context: tokens and width of what every attention is told besides the picture; None = no attention at all, and the
    low-resolution picture is stacked on the noised one instead.
    attended_levels: levels with attention, 0 = full resolution.
    """

    channels: int
    channel_mult: tuple[int, ...]
    depth: int
    train: Batch
    sample: Batch
    context: tuple[int, int] | None = None
    attended_levels: tuple[int, ...] = ()

    @property
    def in_channels(self) -> int:
        return 6 if self.context is None else 3

    @property
    def out_channels(self) -> int:
        """Decoders learn the variance, upsamplers do not (unCLIP, Table 3; GLIDE)."""
        return 3 if self.context is None else 6

    @property
    def head_channels(self) -> int:
        return min(64, self.channels)

    @property
    def norm_groups(self) -> int:
        """32 as in ADM, fewer where a group would have less than four channels."""
        return min(32, self.channels // 4)

    def batch(self, step: str) -> Batch:
        return self.train if step == "train" else self.sample


@dataclass(frozen=True)
class PriorShape:
    """A diffusion prior whose embeddings are as wide as its transformer, since dalle2-pytorch knows no other."""

    width: int
    depth: int
    heads: int
    context_length: int
    samples: int

    def batch(self, step: str) -> Batch:
        return Batch(self.samples, 0)


Shape = UNetShape | PriorShape

SHAPES: dict[str, dict[str, Shape]] = {
    "cpu": {
        "decoder": UNetShape(128, (1, 2, 3, 4), 2, Batch(2, 64), Batch(2, 64), (81, 512), (1, 2, 3)),
        "upsampler_256": UNetShape(128, (1, 2, 3, 4), 1, Batch(4, 64), Batch(1, 256)),
        "upsampler_1024": UNetShape(64, (1, 1, 2, 2, 4, 4), 1, Batch(4, 128), Batch(1, 512)),
        "prior": PriorShape(width=768, depth=12, heads=12, context_length=77, samples=8),
    },
    "gpu": {
        "decoder": UNetShape(192, (1, 2, 3, 4), 3, Batch(64, 64), Batch(16, 64), (81, 512), (1, 2, 3)),
        "upsampler_256": UNetShape(128, (1, 2, 3, 4), 2, Batch(64, 64), Batch(8, 256)),
        "upsampler_1024": UNetShape(96, (1, 1, 2, 2, 4, 4), 2, Batch(16, 256), Batch(2, 1024)),
        "prior": PriorShape(width=1024, depth=16, heads=16, context_length=77, samples=256),
    },
    "tiny": {
        "decoder": UNetShape(16, (1, 2), 1, Batch(2, 16), Batch(2, 16), (5, 24), (1,)),
        "upsampler_256": UNetShape(16, (1, 2), 1, Batch(2, 16), Batch(1, 32)),
        "upsampler_1024": UNetShape(16, (1, 1, 2), 1, Batch(1, 16), Batch(1, 32)),
        "prior": PriorShape(width=32, depth=2, heads=2, context_length=7, samples=2),
    },
}

STEPS = ("train", "sample")
PRECISIONS = ("fp32", "bf16", "autocast")
VARIANTS = ("eager", "compiled", "graph")
GUIDANCE_SCALE = 3.0
"""of the sampling steps that are guided, decoder and prior: the network sees twice the batch"""
PARAMETER_TOLERANCE = 0.02
"""by which a peer's parameter count may differ from ours"""
