"""Guidance as wrappers around `denoise`: classifier-free, and by the gradient of any log probability."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Protocol, Self, TypeVar

import torch

from unclip.diffusion.process import DiffusionProcess, per_sample


class SupportsSelection(Protocol):
    """A batch of conditions."""

    @property
    def batch_size(self) -> int: ...

    def select(self, rows: torch.Tensor) -> Self:
        """The samples `rows` (n,) int64."""
        ...

    def cat(self, other: Self) -> Self:
        """One batch: the samples of this one, then those of `other`."""
        ...


class SupportsGuidance(SupportsSelection, Protocol):
    """A batch of conditions that knows its unconditional counterpart."""

    def unconditional(self) -> Self:
        """The same batch with every condition dropped."""
        ...


ConditionT = TypeVar("ConditionT")
PreparedT = TypeVar("PreparedT", bound=SupportsSelection)
SupportsGuidanceT = TypeVar("SupportsGuidanceT", bound=SupportsGuidance)

Denoise = Callable[[torch.Tensor, torch.Tensor, ConditionT], torch.Tensor]
"""denoise(x_t, timesteps, cond) -> model_output."""

Guide = Callable[[Denoise[Any]], Denoise[Any]]
"""guide(denoise) -> denoise: guidance of the caller's own, such as `gradient_guided` with all but its first argument."""

LogProbability = Callable[[torch.Tensor, torch.Tensor, ConditionT], torch.Tensor]
"""log_probability(x_t, timesteps, cond) -> (B,), differentiable in x_t; row i depends on row i of the arguments alone."""

Interval = tuple[int, int] | tuple[torch.Tensor, torch.Tensor]
"""Timesteps from the first up to but without the second; tensors are (B,), for each sample its own."""


@dataclass(frozen=True)
class GuidedCondition(Generic[PreparedT]):
    """What `classifier_free` conditions on: B unconditional rows, then the same B with their conditions.

    Made once for all steps of a request.
    """

    doubled: PreparedT

    @classmethod
    def of(
        cls, cond: SupportsGuidanceT, prepare: Callable[[SupportsGuidanceT], PreparedT]
    ) -> GuidedCondition[PreparedT]:
        """Both halves of `cond`, through the network's `prepare` at once."""
        return GuidedCondition(prepare(cond.unconditional().cat(cond)))

    @property
    def batch_size(self) -> int:
        return self.doubled.batch_size // 2

    @cached_property
    def conditional(self) -> PreparedT:
        """The second half."""
        first = self.batch_size
        return self.doubled.select(torch.arange(first, 2 * first))

    def select(self, rows: torch.Tensor) -> GuidedCondition[PreparedT]:
        """The samples `rows` (n,) int64, of both halves."""
        return GuidedCondition(self.doubled.select(torch.cat([rows, rows + self.batch_size])))

    def cat(self, other: GuidedCondition[PreparedT]) -> GuidedCondition[PreparedT]:
        """One batch: the samples of this one, then those of `other`."""
        mine, theirs = self.batch_size, other.batch_size
        first, second = torch.arange(2 * mine), 2 * mine + torch.arange(2 * theirs)
        halves = [first[:mine], second[:theirs], first[mine:], second[theirs:]]
        return GuidedCondition(self.doubled.cat(other.doubled).select(torch.cat(halves)))


@dataclass(frozen=True)
class Contrast(Generic[SupportsGuidanceT]):
    """B conditions, and B others that guidance leads their samples away from in place of dropping them."""

    cond: SupportsGuidanceT
    negative: SupportsGuidanceT

    @property
    def batch_size(self) -> int:
        return self.cond.batch_size

    def select(self, rows: torch.Tensor) -> Contrast[SupportsGuidanceT]:
        """The samples `rows` (n,) int64."""
        return Contrast(self.cond.select(rows), self.negative.select(rows))

    def cat(self, other: Contrast[SupportsGuidanceT]) -> Contrast[SupportsGuidanceT]:
        """One batch: the samples of this one, then those of `other`."""
        return Contrast(self.cond.cat(other.cond), self.negative.cat(other.negative))

    def unconditional(self) -> Contrast[SupportsGuidanceT]:
        """Told what is led away from."""
        return Contrast(self.negative, self.negative)


def classifier_free(
    denoise: Denoise[PreparedT],
    guidance_scale: float | torch.Tensor,
    *,
    learned_variance: bool,
    interval: Interval | None = None,
) -> Denoise[GuidedCondition[PreparedT]]:
    """`denoise` with classifier-free guidance: uncond + guidance_scale * (cond - uncond), in one doubled forward pass.

    A scale of 1 gives the conditional output, 0 the unconditional one, above 1 moves away from the unconditional one
    (Ho and Salimans 2022, eq. 6 with w = guidance_scale - 1). Variance channels, the second half of dim 1 where
    `learned_variance`, are those of the conditional pass, as in GLIDE.

    Args:
        guidance_scale: one number, or (B,) for a scale for each sample; `ValueError` where one is negative.
        interval: the timesteps that are guided (Kynkäänniemi et al. 2024); elsewhere the scale is 1, and where that
            holds for the whole batch the unconditional half is not computed. None for all of them.
    """
    _check_scale("guidance_scale", guidance_scale)

    def guided(x_t: torch.Tensor, timesteps: torch.Tensor, cond: GuidedCondition[PreparedT]) -> torch.Tensor:
        scale = _scales("guidance_scale", guidance_scale, x_t)
        if interval is not None:
            inside = (timesteps >= interval[0]) & (timesteps < interval[1])
            if not inside.any():
                return denoise(x_t, timesteps, cond.conditional)
            scale = torch.where(per_sample(inside, x_t) > 0, scale, 1.0)
        # In the sample's float type: extrapolating in the network's bfloat16 would multiply its rounding by the scale.
        model_output = denoise(torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]), cond.doubled).to(x_t.dtype)
        uncond, conditional = model_output.chunk(2)
        return combine(uncond, conditional, scale, learned_variance=learned_variance)

    return guided


def combine(
    uncond: torch.Tensor, conditional: torch.Tensor, scale: torch.Tensor, *, learned_variance: bool
) -> torch.Tensor:
    """uncond + scale * (conditional - uncond), of outputs (B, ...) and scales that broadcast over them.

    With `learned_variance` the second half of dim 1 is that of `conditional`.
    """
    # lerp is exact at both ends, so samples with scales 0 and 1 keep their meaning beside any others.
    if not learned_variance:
        return torch.lerp(uncond, conditional, scale)
    uncond, _ = uncond.chunk(2, dim=1)
    conditional, variance_values = conditional.chunk(2, dim=1)
    return torch.cat([torch.lerp(uncond, conditional, scale), variance_values], dim=1)


def gradient_guided(
    denoise: Denoise[ConditionT],
    log_probability: LogProbability[ConditionT],
    gradient_scale: float | torch.Tensor,
    process: DiffusionProcess,
) -> Denoise[ConditionT]:
    """`denoise` with its score shifted by gradient_scale * grad log p(y | x_t), for any sampler.

    The noise becomes noise - sqrt(1 - abar) * gradient_scale * gradient (Dhariwal and Nichol 2021, eq. 14 and
    algorithm 2); predictions of x_start and v change by what that means for them. Variance channels stay as they are.
    At abar = 0 nothing is shifted: x_t is pure noise, which says nothing about y.

    Args:
        log_probability: of what is asked for, given x_t; `cond` is what `denoise` gets.
        gradient_scale: one number, or (B,) for a scale for each sample; `ValueError` where one is negative.

    Raises `ValueError` when called under torch.inference_mode, where there are no gradients; use torch.no_grad.
    """
    _check_scale("gradient_scale", gradient_scale)

    def guided(x_t: torch.Tensor, timesteps: torch.Tensor, cond: ConditionT) -> torch.Tensor:
        if torch.is_inference_mode_enabled():
            raise ValueError("gradient guidance cannot run under torch.inference_mode: sample under torch.no_grad")
        with torch.enable_grad():
            leaf = x_t.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(log_probability(leaf, timesteps, cond).sum(), leaf)
        shift = per_sample(_shift_by_score(process, timesteps), x_t) * _scales("gradient_scale", gradient_scale, x_t)
        model_output = denoise(x_t, timesteps, cond).to(x_t.dtype)
        prediction, variance_values = process.split(model_output)
        shifted = prediction + shift * gradient
        return shifted if variance_values is None else torch.cat([shifted, variance_values], dim=1)

    return guided


def _shift_by_score(process: DiffusionProcess, timesteps: torch.Tensor) -> torch.Tensor:
    """(B,) float64: what one unit of score adds to the network's prediction, 0 where abar is 0."""
    abar = process.alphas_cumprod(timesteps)
    signal, sigma = abar.sqrt(), (1 - abar).sqrt()
    # noise = -sigma * score, x_start = (x_t - sigma * noise) / signal, v = signal * noise - sigma * x_start.
    shift = {"epsilon": -sigma, "sample": sigma**2 / signal, "v_prediction": -sigma / signal}
    return torch.where(abar > 0, shift[process.config.prediction_type], 0.0)


def _check_scale(name: str, scale: float | torch.Tensor) -> None:
    if bool((torch.as_tensor(scale) < 0).any()):
        raise ValueError(f"{name} must not be negative, but is {scale}")


def _scales(name: str, scale: float | torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
    """`scale` as a tensor that broadcasts over `x_t` (B, ...)."""
    if not isinstance(scale, torch.Tensor):
        return torch.full((), scale, dtype=x_t.dtype, device=x_t.device)
    if scale.shape != x_t.shape[:1]:
        raise ValueError(
            f"{name} must be a number or one for each of {x_t.shape[0]} samples,"
            f" not a tensor of shape {tuple(scale.shape)}"
        )
    return per_sample(scale, x_t)
