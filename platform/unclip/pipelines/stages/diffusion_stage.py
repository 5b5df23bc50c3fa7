"""What the stages that denoise have in common: where their samples begin, the network and process that take them on, and
what they end as.

`sample` of a stage is its `begin`, `SamplingConfig.sample` and its `finish`; who wants something else between the two (an
engine that lets samples come and go, a picture to begin from, pixels that are known) takes the three apart.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import nn

from unclip.diffusion.guidance import Contrast, Guide
from unclip.diffusion.process import DiffusionConfig, DiffusionProcess
from unclip.diffusion.samplers import Progress, SamplingConfig
from unclip.models.condition import Condition
from unclip.utils.random import SampleGenerator


class DiffusionStageConfig(Protocol):
    """What the configurations of these stages have in common."""

    @property
    def diffusion(self) -> DiffusionConfig: ...
    @property
    def sampling(self) -> SamplingConfig: ...


@dataclass(frozen=True)
class Start:
    """Where B samples begin: x_T (B, ...), standard normal float32, and what the network is told (B rows).

    negative: what guidance leads away from (B rows); None: from what the network does without being told.
    """

    x_T: torch.Tensor
    cond: Condition
    negative: Condition | None = None

    @property
    def away(self) -> Condition:
        """What guidance leads away from (B rows)."""
        return self.cond.unconditional() if self.negative is None else self.negative

    def at(self, x_T: torch.Tensor | None) -> Start:
        """The same from another x_T, as an inversion gives one; None: from this one."""
        if x_T is None:
            return self
        if x_T.shape != self.x_T.shape:
            raise ValueError(f"x_T must be {tuple(self.x_T.shape)}, not {tuple(x_T.shape)}")
        return dataclasses.replace(self, x_T=x_T.to(self.x_T))


class DiffusionStage(ABC):
    """A stage that denoises.

    Args:
        config: the stage as the bundle describes it.
        model: its network, on the device and in the precision that it is to run in; the sampler is always float32.
    """

    def __init__(self, config: DiffusionStageConfig, model: nn.Module) -> None:
        self.network = model
        self.process: DiffusionProcess = config.diffusion.build()

    @abstractmethod
    def begin(self, *args: Any, **kwargs: Any) -> Start:
        """Checks what a stage is given, and draws x_T; `ValueError` where something is outside its range."""

    @abstractmethod
    def finish(self, x_start: torch.Tensor) -> torch.Tensor:
        """What the stage hands out of clean samples (B, ...), row by row."""

    @property
    def prepare(self) -> Callable[[Any], Any]:
        """`network.prepare`, which computes once what does not change between the steps of a request."""
        return cast("Callable[[Any], Any]", self.network.prepare)

    def run(
        self,
        start: Start,
        generator: SampleGenerator,
        *,
        sampling: SamplingConfig,
        guide: Guide | None = None,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """From `start` to what `finish` makes of it; `generator` is the one that `begin` had."""
        cond: Any = start.cond
        prepare = self.prepare
        if start.negative is not None:
            cond = Contrast(start.cond, start.negative)
            prepare = lambda both: self.prepare(both.cond)  # noqa: E731
        x_start = sampling.sample(
            self.network,
            start.x_T,
            self.process,
            generator,
            cond,
            prepare=prepare,
            guide=guide,
            progress=progress,
        )
        return self.finish(x_start)
