"""What a sampler is: one vectorised step, in which every sample has a timestep, a predecessor and a history of its own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import torch

from unclip.diffusion.process import DiffusionProcess


@dataclass(frozen=True)
class SamplerState:
    """Where each of B samples is on its way. Samples join a batch by `cat` and leave it by `select`, between any steps."""

    x_t: torch.Tensor
    """(B, ...) the samples."""

    last_x_start: torch.Tensor
    """(B, ...) the clean samples predicted at the last step: also what to show of samples that are on their way."""

    last_timesteps: torch.Tensor
    """(B,) int64 timesteps of those predictions; -1 for a sample that has none yet, whose `last_x_start` is not used."""

    @classmethod
    def start(cls, x_T: torch.Tensor) -> SamplerState:
        """Samples (B, ...) that have taken no step."""
        none = torch.full(x_T.shape[:1], -1, dtype=torch.int64, device=x_T.device)
        return cls(x_t=x_T, last_x_start=torch.zeros_like(x_T), last_timesteps=none)

    def select(self, rows: torch.Tensor) -> SamplerState:
        """The samples `rows` (n,) int64."""
        return SamplerState(self.x_t[rows], self.last_x_start[rows], self.last_timesteps[rows])

    def cat(self, other: SamplerState) -> SamplerState:
        """One batch: the samples of this one, then those of `other`."""
        pairs = ((getattr(self, field.name), getattr(other, field.name)) for field in dataclasses.fields(self))
        return SamplerState(*(torch.cat(pair) for pair in pairs))


class Sampler(Protocol):
    """A way to go from x_t to x_s, s being any earlier timestep, or -1 for the clean sample."""

    @property
    def stochastic(self) -> bool:
        """Whether a step needs noise."""
        ...

    def step(
        self,
        process: DiffusionProcess,
        model_output: torch.Tensor,
        state: SamplerState,
        timesteps: torch.Tensor,
        prev_timesteps: torch.Tensor,
        noise: torch.Tensor | None,
    ) -> SamplerState:
        """The state at `prev_timesteps`; row i depends on row i of the arguments alone.

        Args:
            model_output: the network's output for `state.x_t` (B, ...) at `timesteps`, in the float type of `x_t`.
            timesteps, prev_timesteps: (B,) int64, each sample its own; -1 is the clean sample.
            noise: standard normal, shaped like `x_t`; None only where the sampler is not `stochastic`.
        """
        ...


@dataclass(frozen=True)
class MixedSampler:
    """One step for samples of different samplers: each `parts` entry is a sampler and its rows (n,) int64.

    The rows of all parts together are those of the batch, each once.
    """

    parts: tuple[tuple[Sampler, torch.Tensor], ...]

    @property
    def stochastic(self) -> bool:
        return any(sampler.stochastic for sampler, _ in self.parts)

    def step(
        self,
        process: DiffusionProcess,
        model_output: torch.Tensor,
        state: SamplerState,
        timesteps: torch.Tensor,
        prev_timesteps: torch.Tensor,
        noise: torch.Tensor | None,
    ) -> SamplerState:
        """Each part's step on its rows."""
        stepped = [
            sampler.step(
                process,
                model_output[rows],
                state.select(rows),
                timesteps[rows],
                prev_timesteps[rows],
                None if noise is None else noise[rows],
            )
            for sampler, rows in self.parts
        ]
        in_order = torch.cat([rows for _, rows in self.parts]).argsort()
        return reduce(SamplerState.cat, stepped).select(in_order)


def required(noise: torch.Tensor | None, sampler: str) -> torch.Tensor:
    """`noise`, which `sampler` cannot do without."""
    if noise is None:
        raise ValueError(f"sampler {sampler} needs noise")
    return noise
