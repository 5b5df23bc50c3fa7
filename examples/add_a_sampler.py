"""A sampler from outside the package: consistency sampling (Song et al. 2023, "Consistency Models", algorithm 1).

At each step the network's clean picture is taken for the sample and noised again, to the level of the next timestep. It is
for networks that give a clean picture in one step, as distilled ones do; of them it makes better pictures with more steps.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from unclip.config.base import Config
from unclip.config.cli import parse_flags
from unclip.diffusion.process import DiffusionProcess, per_sample
from unclip.diffusion.samplers import Sampler, SamplerState, SamplingConfig
from unclip.generation.outputs import write_png
from unclip.pipelines.pipeline import Pipeline
from unclip.pipelines.stages import DecoderStage


# --8<-- [start:sampler]
@dataclass(frozen=True)
class ConsistencySampler:
    """x_s = sqrt(abar_s) x_start + sqrt(1 - abar_s) noise; a step to the clean sample (-1) gives x_start."""

    @property
    def stochastic(self) -> bool:
        return True

    def step(
        self,
        process: DiffusionProcess,
        model_output: torch.Tensor,
        state: SamplerState,
        timesteps: torch.Tensor,
        prev_timesteps: torch.Tensor,
        noise: torch.Tensor | None,
    ) -> SamplerState:
        """See `Sampler.step`: every sample has timesteps of its own, and row i depends on row i alone."""
        assert noise is not None
        prediction, _ = process.split(model_output)
        x_start = process.pred_x_start(prediction, state.x_t, timesteps)
        abar_s = process.alphas_cumprod(prev_timesteps)  # (B,) float64, 1 at timestep -1
        x_s = per_sample(abar_s.sqrt(), x_start) * x_start + per_sample((1 - abar_s).sqrt(), x_start) * noise
        return SamplerState(x_t=x_s, last_x_start=x_start, last_timesteps=timesteps)


# --8<-- [end:sampler]
# --8<-- [start:config]
class ConsistencySampling(SamplingConfig):
    """How a stage samples, with one sampler more."""

    sampler: Literal["consistency"] = "consistency"  # type: ignore[assignment]  # in place of the house's names

    @classmethod
    def build_sampler(cls, configs: Sequence[SamplingConfig], device: torch.device) -> Sampler:
        return ConsistencySampler()


# --8<-- [end:config]
# --8<-- [start:use]
def with_consistency(pipeline: Pipeline, *, num_inference_steps: int) -> Pipeline:
    """The pipeline whose decoder samples so; all that it is asked for afterwards goes through this sampler."""
    stage = pipeline.decoder
    sampling = ConsistencySampling(num_inference_steps=num_inference_steps, timestep_spacing="trailing")
    pipeline.decoder = DecoderStage(stage.config.model_copy(update={"sampling": sampling}), stage.network)
    return pipeline


# --8<-- [end:use]
class DrawConfig(Config):
    """One picture."""

    bundle: str
    """Folder of a bundle."""
    prompt: str = "a red heart"
    """What to draw."""
    steps: int = 4
    """Evaluations of the decoder."""
    out: str = "consistency.png"
    """Where the picture goes."""


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_flags(__doc__ or "", DrawConfig, argv, positional="bundle")
    pipeline = with_consistency(Pipeline.from_bundle(config.bundle, "cpu"), num_inference_steps=config.steps)
    images = pipeline([config.prompt], seeds=[0]).images
    write_png(images[max(images)][0], config.out, {"prompt": config.prompt})
    return 0


if __name__ == "__main__":
    sys.exit(main())
