"""Known pixels: samples of which a part is given, for inpainting with any network (GLIDE, section 4.3, forces them so too)."""

from __future__ import annotations

from typing import Any

import torch

from unclip.diffusion.guidance import ConditionT, Denoise
from unclip.diffusion.process import DiffusionProcess


def known_pixels(
    denoise: Denoise[ConditionT], known: torch.Tensor, mask: torch.Tensor, process: DiffusionProcess
) -> Denoise[ConditionT]:
    """`denoise` whose predicted x_start has the known pixels in place of its own, at every step of any sampler.

    So x_t is at each noise level that of a picture with these pixels, and the network continues them. The prediction
    changes to what that x_start means for it; variance channels stay. A row of which nothing is known passes bit by bit.
    Where the prediction is not x_start itself, its arithmetic leaves float rounding: `keep_known` of what the sampler
    ends with makes the known pixels exact.

    Args:
        known: (B, C, H, W) in [-1, 1], the rows of the batch; what `mask` leaves out is not looked at.
        mask: (B, 1, H, W) bool, True = known.
    """
    _check_mask(known, mask)
    has_known = mask.flatten(1).any(dim=1).view(-1, *[1] * (known.ndim - 1))

    def constrained(x_t: torch.Tensor, timesteps: torch.Tensor, cond: ConditionT) -> torch.Tensor:
        if x_t.shape != known.shape:
            raise ValueError(f"known must be {tuple(x_t.shape)} as x_t, not {tuple(known.shape)}")
        prediction, variance_values = process.split(denoise(x_t, timesteps, cond).to(x_t.dtype))
        # Thresholded before they meet: the scale of a dynamic threshold is that of the network's own pixels.
        x_start = keep_known(process.pred_x_start(prediction, x_t, timesteps), known, mask)
        implied = process.target(x_start, process.pred_noise(x_start, x_t, timesteps), timesteps)
        prediction = torch.where(has_known, implied, prediction)
        return prediction if variance_values is None else torch.cat([prediction, variance_values], dim=1)

    return constrained


def keep_known(x_start: torch.Tensor, known: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`x_start` (B, C, H, W) with the pixels of `known` (B, C, H, W) where `mask` (B, 1, H, W) bool is True, bit by bit."""
    return torch.where(mask, known.to(x_start), x_start)


def _check_mask(known: torch.Tensor, mask: torch.Tensor) -> None:
    expected: Any = (known.shape[0], 1, *known.shape[2:])
    if mask.dtype != torch.bool or tuple(mask.shape) != expected:
        raise ValueError(f"mask must be bool {expected}, True = known, not {mask.dtype} {tuple(mask.shape)}")
