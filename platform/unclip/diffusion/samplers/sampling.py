"""`SamplingConfig`, how a stage samples, and `MixedSampling`, how each sample of one batch is sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

import torch
from pydantic import Field, model_validator

from unclip.config.base import Config
from unclip.diffusion.guidance import Denoise, Guide, GuidedCondition, SupportsGuidanceT, classifier_free
from unclip.diffusion.process import DiffusionProcess
from unclip.diffusion.respacing import TimestepSpacing, explicit_timesteps, sampling_timesteps
from unclip.diffusion.samplers.base import MixedSampler, Sampler
from unclip.diffusion.samplers.ddim import DDIM
from unclip.diffusion.samplers.ddpm import DDPM
from unclip.diffusion.samplers.dpm_solver import DPMSolverPP
from unclip.diffusion.samplers.loop import Progress, run_steps
from unclip.utils.random import SampleGenerator

SamplerName = Literal["ddpm", "ddim", "dpmsolver++", "sde-dpmsolver++"]

T = TypeVar("T")


def as_given(cond: T) -> T:
    """The `prepare` of a network that has nothing to compute ahead."""
    return cond


class SamplingConfig(Config):
    """How a stage samples."""

    sampler: SamplerName = "ddpm"
    """Ancestral steps (ddpm), DDIM, or DPM-Solver++ of second order for the ODE or the SDE (sde-dpmsolver++)."""

    num_inference_steps: int = Field(default=250, ge=1)
    """Number of network evaluations; at most num_train_timesteps."""

    timestep_spacing: TimestepSpacing = "linspace"
    """Which timesteps are visited: linspace, leading, trailing, or GLIDE's list of 27 (fast27)."""

    timesteps_list: tuple[int, ...] | None = None
    """The timesteps themselves, descending and num_inference_steps of them; null for those of timestep_spacing."""

    guidance_scale: float = Field(default=1.0, ge=0)
    """Classifier-free guidance; 1 is off, 0 ignores the condition but in a learned variance, which is never guided."""

    guidance_interval: tuple[float, float] | None = None
    """Guides only timesteps between these fractions of num_train_timesteps, say 0.2 and 0.9; null for all."""

    eta: float = Field(default=0.0, ge=0, le=1)
    """Noise of a DDIM step: 0 is deterministic, 1 as much as the DDPM posterior's."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sampler != "ddim" and self.eta != 0:
            raise ValueError(f"eta = {self.eta} is a setting of sampler ddim, not of {self.sampler}")
        if self.timesteps_list is not None and len(self.timesteps_list) != self.num_inference_steps:
            raise ValueError(
                f"timesteps_list has {len(self.timesteps_list)} timesteps, but num_inference_steps ="
                f" {self.num_inference_steps}: set timesteps_list to null for timestep_spacing to choose them"
            )
        if self.guidance_interval is not None and not 0 <= self.guidance_interval[0] < self.guidance_interval[1] <= 1:
            raise ValueError(f"guidance_interval must rise within 0..1, but is {list(self.guidance_interval)}")
        return self

    def timesteps(self, num_train_timesteps: int) -> list[int]:
        """The timesteps visited, descending; `ValueError` where these settings do not suit `num_train_timesteps`."""
        if self.timesteps_list is not None:
            return explicit_timesteps(num_train_timesteps, self.timesteps_list)
        return sampling_timesteps(num_train_timesteps, self.num_inference_steps, self.timestep_spacing)

    def guided_timesteps(self, num_train_timesteps: int) -> tuple[int, int]:
        """The timesteps that are guided: from the first up to but without the second."""
        low, high = self.guidance_interval or (0.0, 1.0)
        return round(low * num_train_timesteps), round(high * num_train_timesteps)

    @classmethod
    def build_sampler(cls, configs: Sequence[SamplingConfig], device: torch.device) -> Sampler:
        """One step for samples with these settings, all of this class and of the same `sampler`.

        A subclass with a sampler of its own builds that here; docs/extending.md shows one.
        """
        name = configs[0].sampler
        if name == "ddpm":
            return DDPM()
        if name == "ddim":
            etas = [config.eta for config in configs]
            alike = len(set(etas)) == 1
            return DDIM(etas[0] if alike else torch.tensor(etas, dtype=torch.float64, device=device))
        return DPMSolverPP(stochastic=name == "sde-dpmsolver++")

    def sample(
        self,
        denoise: Denoise[Any],
        x_T: torch.Tensor,
        process: DiffusionProcess,
        generator: SampleGenerator,
        cond: SupportsGuidanceT,
        *,
        prepare: Callable[[SupportsGuidanceT], Any] = as_given,
        guide: Guide | None = None,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """`MixedSampling.sample` with these settings for every sample."""
        mixed = MixedSampling([self] * x_T.shape[0])
        return mixed.sample(denoise, x_T, process, generator, cond, prepare=prepare, guide=guide, progress=progress)


@dataclass(frozen=True)
class MixedSampling:
    """Settings of its own for each sample of a batch; a sample comes out as it would alone, whatever is beside it.

    One network call a step serves all samples. An engine that lets requests come and go between steps makes `sampler`
    anew for each membership of its batch, and keeps `SamplerState` and the conditions itself.
    """

    configs: Sequence[SamplingConfig]

    @property
    def needs_guidance(self) -> bool:
        """Whether any sample has a guidance scale but 1."""
        return any(config.guidance_scale != 1 for config in self.configs)

    def select(self, rows: Sequence[int]) -> MixedSampling:
        """The settings of the samples `rows`."""
        return MixedSampling([self.configs[row] for row in rows])

    def sampler(self, device: torch.device) -> Sampler:
        """One step for all samples: a sampler, or several with their rows where the settings name several."""
        rows: dict[tuple[type[SamplingConfig], str], list[int]] = {}
        for row, config in enumerate(self.configs):
            rows.setdefault((type(config), config.sampler), []).append(row)
        samplers = {kind: kind[0].build_sampler(self.select(group).configs, device) for kind, group in rows.items()}
        if len(samplers) == 1:
            return next(iter(samplers.values()))
        return MixedSampler(tuple((samplers[kind], torch.tensor(rows[kind], device=device)) for kind in rows))

    def guided(
        self, denoise: Denoise[Any], process: DiffusionProcess, device: torch.device
    ) -> Denoise[GuidedCondition[Any]]:
        """`denoise` with each sample's guidance scale and interval."""
        scales = torch.tensor([config.guidance_scale for config in self.configs], dtype=torch.float64, device=device)
        interval = None
        if any(config.guidance_interval is not None for config in self.configs):
            bounds = [config.guided_timesteps(process.num_train_timesteps) for config in self.configs]
            start, stop = torch.tensor(bounds, device=device).unbind(dim=1)
            interval = start, stop
        learned_variance = process.config.variance_type == "learned_range"
        return classifier_free(denoise, scales, learned_variance=learned_variance, interval=interval)

    @torch.no_grad()
    def sample(
        self,
        denoise: Denoise[Any],
        x_T: torch.Tensor,
        process: DiffusionProcess,
        generator: SampleGenerator,
        cond: SupportsGuidanceT,
        *,
        prepare: Callable[[SupportsGuidanceT], Any] = as_given,
        guide: Guide | None = None,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """x_start (B, ...) from standard normal `x_T` (B, ...) under `cond`.

        Args:
            denoise: takes what `prepare` makes of a condition.
            generator: one stream a sample, on the device of `x_T`.
            prepare: the network's work that is the same at every step; called once, for both halves of the guidance.
            guide: further guidance, around the classifier-free one; where the samples differ in their number of steps
                it sees only those that still have some to take.
            progress: called with (steps done, steps in all) after every step.
        """
        if len(self.configs) != x_T.shape[0]:
            raise ValueError(f"{len(self.configs)} samplings for {x_T.shape[0]} samples: one for each is needed")
        needs_guidance = self.needs_guidance

        def settings(rows: list[int]) -> tuple[Sampler, Denoise[Any]]:
            part = self.select(rows)
            network = part.guided(denoise, process, x_T.device) if needs_guidance else denoise
            return part.sampler(x_T.device), network if guide is None else guide(network)

        prepared = GuidedCondition.of(cond, prepare) if needs_guidance else prepare(cond)
        timesteps = [config.timesteps(process.num_train_timesteps) for config in self.configs]
        return run_steps(settings, x_T, timesteps, process, generator, prepared, progress)
