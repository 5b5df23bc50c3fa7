"""A picture changed in the direction from one caption to another (unCLIP §3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from unclip.config.base import ConfigError
from unclip.pipelines.cascade import CascadeOutput, GenerationOptions
from unclip.pipelines.draw import StageProgress
from unclip.pipelines.inversion import deterministic, invert
from unclip.pipelines.manipulations.sphere import slerp
from unclip.pipelines.pipeline import AS_STORED, Pipeline

DUMMY_CAPTION = "a photo"
"""Stands for a picture whose caption is not known."""
MAX_THETA = 0.5
"""§3.3 ends between 0.25 and 0.5 of the way."""
LEAST_DIFFERENCE = 1e-3
"""Of two captions' embeddings: below it the direction between them is rounding."""


def thetas(frames: int, max_theta: float = MAX_THETA) -> list[float]:
    """Shares of the way, evenly from 0 to `max_theta`."""
    return [max_theta * index / max(1, frames - 1) for index in range(frames)]


def direction(pipeline: Pipeline, target: str, source: str | None = DUMMY_CAPTION) -> torch.Tensor:
    """z_d (1, D) of unit norm: from the caption `source` to `target` in CLIP's space; None: `target` itself.

    Raises `ConfigError` where CLIP sees no difference between the two.
    """
    difference = pipeline.encode_text([target])
    if source is not None:
        difference = difference - pipeline.encode_text([source])
    if float(difference.norm()) < LEAST_DIFFERENCE:
        raise ConfigError(f"target = {target!r}: means the same to CLIP as the source caption, {source!r}")
    return functional.normalize(difference, dim=1)


def text_diff(
    pipeline: Pipeline,
    pictures: npt.NDArray[np.uint8] | torch.Tensor,
    target: str,
    *,
    source: str | None = DUMMY_CAPTION,
    path: Sequence[float] = tuple(thetas(6)),
    seed: int = 0,
    options: GenerationOptions = AS_STORED,
    progress: StageProgress | None = None,
) -> CascadeOutput:
    """Each picture on its way towards `target`: z_i turned towards z_d, x_T fixed to the picture's inversion.

    Args:
        pictures: uint8 (N, H, H, 3), H a multiple of the decoder's size.
        source: what the pictures are a caption of now, a dummy, or None for the target's own embedding as direction.
        path: K shares theta of the angle to z_d; row `n * K + k` of the output is picture n at theta k. At 0 it comes
            back as from its inversion.
        seed: of the upsamplers, the same for all.
    """
    latents = invert(pipeline, pictures, options=options).repeat(len(path))
    # Turned, and neither longer nor shorter for it: z_i need not have unit norm.
    towards = direction(pipeline, target, source) * latents.image_embed.norm(dim=1, keepdim=True)
    share = torch.tensor(path, dtype=torch.float64, device=pipeline.device).repeat(len(pictures))
    draw = pipeline.draw([seed] * len(share), options=deterministic(options), progress=progress)
    return draw.cascade_of(image_embed=slerp(latents.image_embed, towards, share), x_T=latents.x_T)
