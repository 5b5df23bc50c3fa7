"""What steers single rows of a batch beside their conditions: pixels that are known, and the decoder's gradient guides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from unclip.diffusion.guidance import Denoise, Guide, gradient_guided
from unclip.diffusion.process import DiffusionProcess
from unclip.pipelines.guides import DecoderGuide, GuideName
from unclip.pipelines.known import KnownPixels


@dataclass(frozen=True)
class Steering:
    """Of one row: the pixels that it keeps (one picture), and for each guide the scale and the target (1, ...)."""

    known: KnownPixels | None = None
    targets: Mapping[GuideName, tuple[float, torch.Tensor]] = field(default_factory=dict)


def steer(rows: Sequence[Steering], guides: Mapping[GuideName, DecoderGuide], process: DiffusionProcess) -> list[Guide]:
    """What a network is wrapped in, in this order, for a batch of `rows`; each row is touched by what it asks for alone."""
    found: list[Guide] = []
    for name, guide in guides.items():
        asking = [place for place, row in enumerate(rows) if name in row.targets]
        if asking:
            scales, targets = zip(*(rows[place].targets[name] for place in asking), strict=True)
            found.append(_on_rows(_towards(guide, torch.cat(targets), scales, process), asking))
    known = {place: row.known for place, row in enumerate(rows) if row.known is not None}
    # Each size of seam has rows of its own, but the seam is for the picture at the end: here it does not matter.
    if known:
        pixels, masks = (torch.cat(parts) for parts in zip(*((k.pixels, k.mask) for k in known.values()), strict=True))
        found.append(_on_rows(KnownPixels(pixels, masks).guide(process), list(known)))
    return found


def _towards(guide: DecoderGuide, target: torch.Tensor, scales: Sequence[float], process: DiffusionProcess) -> Guide:
    log_probability = guide.log_probability(target)
    scale = torch.tensor(scales, dtype=torch.float64, device=target.device)

    def guided(denoise: Denoise[Any]) -> Denoise[Any]:
        return gradient_guided(denoise, log_probability, scale, process)

    return guided


def _on_rows(guide: Guide, places: Sequence[int]) -> Guide:
    """`guide` for the rows `places` alone: the network runs once for all, and the others pass bit by bit."""

    def wrapped(denoise: Denoise[Any]) -> Denoise[Any]:
        def guided(x_t: torch.Tensor, timesteps: torch.Tensor, cond: Any) -> torch.Tensor:
            output = denoise(x_t, timesteps, cond).to(x_t.dtype)
            rows = torch.tensor(places, device=x_t.device)
            steered = guide(lambda *_: output[rows])(x_t[rows], timesteps[rows], cond)
            return output.index_copy(0, rows, steered)

        return guided

    return wrapped
