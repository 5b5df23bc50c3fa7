"""Variations of a picture: what CLIP knows of it stays, the rest is drawn anew (unCLIP §3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from unclip.pipelines.cascade import CascadeOutput, GenerationOptions
from unclip.pipelines.draw import StageProgress
from unclip.pipelines.inversion import Latents, deterministic, invert
from unclip.pipelines.pipeline import AS_STORED, Pipeline


def variations(
    pipeline: Pipeline,
    pictures: npt.NDArray[np.uint8] | torch.Tensor,
    seeds: Sequence[int],
    *,
    eta: float = 1.0,
    options: GenerationOptions = AS_STORED,
    progress: StageProgress | None = None,
) -> CascadeOutput:
    """DDIM from each picture's (z_i, x_T), with noise: a picture for every seed.

    Args:
        pictures: uint8 (N, H, H, 3), H a multiple of the decoder's size.
        seeds: K of them; row `n * K + k` of the output is picture n with seed k.
        eta: noise of a step, 0 to 1. With 0 the picture comes back, but for what its inversion loses; with 1 what
            varies is all that z_i does not hold.
    """
    latents = invert(pipeline, pictures, options=options)
    return redrawn(pipeline, latents, seeds, eta=eta, options=options, progress=progress)


def redrawn(
    pipeline: Pipeline,
    latents: Latents,
    seeds: Sequence[int],
    *,
    eta: float,
    options: GenerationOptions = AS_STORED,
    progress: StageProgress | None = None,
) -> CascadeOutput:
    """`variations` of pictures that were inverted with the same options; arguments and output as there."""
    starts, drawing = latents.repeat(len(seeds)), deterministic(options, eta=eta)
    draw = pipeline.draw(list(seeds) * len(latents.x_T), options=drawing, progress=progress)
    return draw.cascade_of(image_embed=starts.image_embed, x_T=starts.x_T)
