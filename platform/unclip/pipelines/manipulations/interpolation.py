"""The way from one picture to the next: z_i, and the noise, along great circles (unCLIP §3.2)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from unclip.pipelines.cascade import CascadeOutput, GenerationOptions
from unclip.pipelines.draw import StageProgress
from unclip.pipelines.inversion import deterministic, invert
from unclip.pipelines.manipulations.sphere import slerp
from unclip.pipelines.pipeline import AS_STORED, Pipeline

NoiseName = Literal["interpolated", "shared"]


def interpolation(
    pipeline: Pipeline,
    pictures: npt.NDArray[np.uint8] | torch.Tensor,
    *,
    frames: int = 7,
    noise: NoiseName = "interpolated",
    seed: int = 0,
    options: GenerationOptions = AS_STORED,
    progress: StageProgress | None = None,
) -> CascadeOutput:
    """Pictures on the way through all of `pictures`, in their order.

    Args:
        pictures: uint8 (N, H, H, 3), N at least 2, H a multiple of the decoder's size.
        frames: pictures from each to the next, with both; (N - 1) * (frames - 1) + 1 in all.
        noise: `interpolated`: x_T is on the way between the inversions, and each of `pictures` comes back where the way
            meets it; `shared`: one x_T for all, drawn from `seed`, so that z_i alone changes.
        seed: of that x_T and of the upsamplers, the same for all frames.
    """
    if len(pictures) < 2 or frames < 2:
        raise ValueError(f"{len(pictures)} pictures, frames = {frames}: a way needs at least 2 of each")
    x_T = None
    if noise == "interpolated":
        latents = invert(pipeline, pictures, options=options)
        ends, x_T = latents.image_embed, latents.x_T
    else:
        ends = pipeline.encode_image(pictures)
    places = torch.arange((len(pictures) - 1) * (frames - 1) + 1, device=pipeline.device)
    first = (places // (frames - 1)).clamp(max=len(pictures) - 2)
    share = places.double() / (frames - 1) - first
    image_embed = slerp(ends[first], ends[first + 1], share)
    x_T = None if x_T is None else slerp(x_T[first], x_T[first + 1], share)
    draw = pipeline.draw([seed] * len(places), options=deterministic(options), progress=progress)
    return draw.cascade_of(image_embed=image_embed, x_T=x_T)
