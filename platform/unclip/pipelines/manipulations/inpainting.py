"""Parts of a picture drawn anew, and pictures continued beyond their border (GLIDE, section 4.3, by a whole cascade)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from unclip.pipelines.cascade import CascadeOutput, GenerationOptions
from unclip.pipelines.draw import StageProgress
from unclip.pipelines.known import known_at
from unclip.pipelines.pipeline import AS_STORED, Pipeline

Picture = npt.NDArray[np.uint8]
Place = Literal["centre", "left", "right", "top", "bottom"]
FEATHER = 1 / 64
"""Share of the side."""


def inpainting(
    pipeline: Pipeline,
    picture: Picture,
    keep: npt.NDArray[np.bool_],
    prompt: str,
    seeds: Sequence[int],
    *,
    feather: float = FEATHER,
    options: GenerationOptions = AS_STORED,
    progress: StageProgress | None = None,
) -> CascadeOutput:
    """`picture` with all that is not to be kept drawn anew, once for each seed, as a part of a picture of `prompt`.

    At every size of the cascade, the pixels that are kept are those of the picture, scaled down by area: bit by bit in
    what comes out, and held at every step while the others are drawn. A decoder that was trained to inpaint is told
    them besides. A smaller picture's pixel is kept where all of it is.

    Args:
        picture: uint8 (S, S, 3), S the largest size of the cascade, which `options.up_to` chooses.
        keep: (S, S) bool, True = this pixel stays.
        prompt: what the whole picture shall show, not the new part alone.
        feather: reach of the soft seam, in what is drawn, as a share of the side; 0 for a hard one.
    """
    draw = pipeline.draw(seeds, options=options, progress=progress)
    sizes = draw.cascade.sizes.values()
    side = max(sizes)
    if picture.shape != (side, side, 3) or keep.shape != (side, side):
        raise ValueError(f"picture and keep must be ({side}, {side}), not {picture.shape[:2]} and {keep.shape}")
    count = len(seeds)
    pictures = torch.from_numpy(np.array(picture)).expand(count, -1, -1, -1)
    known = known_at(pictures, torch.from_numpy(np.array(keep)).expand(count, -1, -1), sizes, feather=feather)
    prompts = [prompt] * count
    image_embed = draw.prior(prompts) if "prior" in draw.cascade.sampling else None
    return draw.cascade_of(prompts=prompts, image_embed=image_embed, known=known)


def on_canvas(
    picture: Picture, size: int, *, share: float = 0.5, place: Place = "centre"
) -> tuple[Picture, npt.NDArray[np.bool_]]:
    """A square canvas with the picture on it, and which of its pixels to keep: outpainting is inpainting of that.

    Args:
        picture: uint8 (H, W, 3) of any shape.
        size: side of the canvas.
        share: the picture's longer side as a share of the canvas's.
        place: where on the canvas it lies.
    """
    height, width = picture.shape[:2]
    scale = share * size / max(height, width)
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    left = {"left": 0, "right": size - width}.get(place, (size - width) // 2)
    top = {"top": 0, "bottom": size - height}.get(place, (size - height) // 2)
    inside = np.s_[top : top + height, left : left + width]
    canvas, keep = np.full((size, size, 3), 127, dtype=np.uint8), np.zeros((size, size), dtype=bool)
    canvas[inside] = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
    keep[inside] = True
    return canvas, keep
