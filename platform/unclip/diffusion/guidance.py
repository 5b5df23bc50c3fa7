"""Guidance as a wrapper around `denoise`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, Self, TypeVar

import torch


class SupportsGuidance(Protocol):
    """A batch of conditions that knows its unconditional counterpart."""

    def unconditional(self) -> Self:
        """The same batch with every condition dropped."""
        ...

    def cat(self, other: Self) -> Self:
        """One batch: the samples of this one, then those of `other`."""
        ...


ConditionT = TypeVar("ConditionT")
GuidedConditionT = TypeVar("GuidedConditionT", bound=SupportsGuidance)

Denoise = Callable[[torch.Tensor, torch.Tensor, ConditionT], torch.Tensor]
"""denoise(x_t, timesteps, cond) -> model_output."""


def classifier_free(
    denoise: Denoise[GuidedConditionT], guidance_scale: float | torch.Tensor, *, learned_variance: bool
) -> Denoise[GuidedConditionT]:
    """`denoise` with classifier-free guidance: uncond + guidance_scale * (cond - uncond), in one doubled forward pass.

    A scale of 1 gives the conditional output, 0 the unconditional one, above 1 moves away from the unconditional one
    (Ho and Salimans 2022, eq. 6 with w = guidance_scale - 1). Variance channels, the second half of dim 1 where
    `learned_variance`, are those of the conditional pass, as in GLIDE.

    Args:
        guidance_scale: one number, or (B,) for a scale for each sample.
    """

    def guided(x_t: torch.Tensor, timesteps: torch.Tensor, cond: GuidedConditionT) -> torch.Tensor:
        scale = _per_sample(guidance_scale, x_t)
        doubled = cond.unconditional().cat(cond)
        # In the sample's float type: extrapolating in the network's bfloat16 would multiply its rounding by the scale.
        model_output = denoise(torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]), doubled).to(x_t.dtype)
        uncond, conditional = model_output.chunk(2)
        if not learned_variance:
            return uncond + scale * (conditional - uncond)
        uncond, _ = uncond.chunk(2, dim=1)
        conditional, variance_values = conditional.chunk(2, dim=1)
        return torch.cat([uncond + scale * (conditional - uncond), variance_values], dim=1)

    return guided


def _per_sample(guidance_scale: float | torch.Tensor, x_t: torch.Tensor) -> float | torch.Tensor:
    if not isinstance(guidance_scale, torch.Tensor):
        return guidance_scale
    if guidance_scale.shape != x_t.shape[:1]:
        raise ValueError(
            f"guidance_scale must be a number or one for each of {x_t.shape[0]} samples,"
            f" not a tensor of shape {tuple(guidance_scale.shape)}"
        )
    return guidance_scale.to(device=x_t.device, dtype=x_t.dtype).reshape(-1, *[1] * (x_t.ndim - 1))
