"""Which timestep a training sample gets, and the weight that keeps the loss unbiased."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from unclip.utils.random import SampleGenerator

TimestepSampling = Literal["uniform", "loss_aware"]

_HISTORY = 10
"""Losses kept of each timestep (improved DDPM, section 3.3)."""
_UNIFORM_SHARE = 0.001
"""Share of draws that ignore the losses, so that no timestep is ever forgotten (as in guided-diffusion)."""


def uniform_timesteps(num_train_timesteps: int, generator: SampleGenerator) -> tuple[torch.Tensor, torch.Tensor]:
    """Timesteps (B,) int64 that are all as likely, and their weights (B,) float32: 1."""
    timesteps = generator.integers(num_train_timesteps)
    return timesteps, torch.ones(timesteps.shape, device=timesteps.device)


class LossAwareTimesteps:
    """Importance sampling by loss (Nichol and Dhariwal 2021, section 3.3): p(t) goes with sqrt(E[L_t^2]).

    E[L_t^2] is estimated from the last 10 losses of each timestep; until every one has that many, draws are uniform.
    The variational bound, whose terms differ by orders of magnitude, has far less noise in its gradient so.
    """

    def __init__(self, num_train_timesteps: int) -> None:
        self._losses = torch.zeros(num_train_timesteps, _HISTORY, device="cpu")
        self._seen = torch.zeros(num_train_timesteps, dtype=torch.int64, device="cpu")

    @property
    def num_train_timesteps(self) -> int:
        return len(self._seen)

    def probabilities(self) -> torch.Tensor:
        """(T,) float64 on the CPU; they sum to 1."""
        uniform = torch.full(
            (self.num_train_timesteps,), 1 / self.num_train_timesteps, dtype=torch.float64, device="cpu"
        )
        magnitude = self._losses.double().square().mean(dim=1).sqrt()
        if self._seen.min() < _HISTORY or magnitude.sum() == 0:
            return uniform
        return (1 - _UNIFORM_SHARE) * magnitude / magnitude.sum() + _UNIFORM_SHARE * uniform

    def draw(self, generator: SampleGenerator) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps (B,) int64 and weights 1 / (T p(t)) (B,) float32: a weighted mean estimates the uniform one.

        A sample's timestep comes from its own stream by the inverse distribution function.
        """
        probabilities = self.probabilities().to(generator.keys.device)
        # Two draws of 24 bits: one alone would be coarse beside the least probability of 0.001 / T.
        high, low = generator.uniform((2,)).double().unbind(dim=1)
        timesteps = torch.searchsorted(probabilities.cumsum(dim=0), high + low * 2.0**-24, right=True)
        timesteps = timesteps.clamp(max=self.num_train_timesteps - 1)  # the sum may round to less than 1
        return timesteps, (1 / (self.num_train_timesteps * probabilities[timesteps])).float()

    def observe(self, timesteps: torch.Tensor, losses: torch.Tensor) -> None:
        """Takes in `losses` (n,), not importance-weighted, at `timesteps` (n,), oldest first; skips what is not finite."""
        finite = losses.isfinite()
        timesteps, losses = timesteps[finite].cpu(), losses[finite].cpu()
        by_timestep = timesteps.argsort(stable=True)
        timesteps, losses = timesteps[by_timestep], losses[by_timestep]
        counts = torch.bincount(timesteps, minlength=self.num_train_timesteps)
        nth = torch.arange(len(timesteps), device="cpu") - (counts.cumsum(dim=0) - counts)[timesteps]
        kept = nth >= counts[timesteps] - _HISTORY
        slots = (self._seen[timesteps] + nth) % _HISTORY
        self._losses[timesteps[kept], slots[kept]] = losses[kept]
        self._seen += counts

    def state(self) -> dict[str, torch.Tensor]:
        """What has been learned: `losses` (T, 10) float32, a ring for each timestep, and `losses_seen` (T,) int64."""
        return {"losses": self._losses.clone(), "losses_seen": self._seen.clone()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on from `state`; `ValueError` where it is that of another number of timesteps."""
        if len(state["losses"]) != self.num_train_timesteps:
            raise ValueError(f"state is of {len(state['losses'])} timesteps, not {self.num_train_timesteps}")
        self._losses.copy_(state["losses"])
        self._seen.copy_(state["losses_seen"])
