"""Pictures as (z_i, x_T): what CLIP knows of them, and the noise that leads the decoder back to the rest (unCLIP §3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from unclip.config.base import ConfigError
from unclip.diffusion.guidance import GuidedCondition
from unclip.diffusion.samplers import MixedSampling, SamplingConfig, ddim_invert
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.pictures import at_size, to_signed
from unclip.pipelines.pipeline import AS_STORED, Pipeline
from unclip.pipelines.stages.decoder import ConditionPart
from unclip.utils.random import SampleGenerator

STEPS = 50
"""DDIM steps, there and back, where options name no number."""


@dataclass(frozen=True)
class Latents:
    """The two halves of N pictures: image_embed (N, D), z_i of unit norm, and x_T (N, 3, S, S) of the decoder."""

    image_embed: torch.Tensor
    x_T: torch.Tensor

    def repeat(self, times: int) -> Latents:
        """Each picture `times` times in a row."""
        return Latents(self.image_embed.repeat_interleave(times, 0), self.x_T.repeat_interleave(times, 0))


def deterministic(options: GenerationOptions, *, eta: float = 0.0) -> GenerationOptions:
    """`options` with the decoder's DDIM, which alone comes back from an inversion: `STEPS` trailing ones unless they say else.

    Raises `ConfigError` where they ask for another sampler, for another `eta`, or for guides, which an inversion does not
    go through.
    """
    decoder = options.decoder
    if decoder.sampler not in (None, "ddim"):
        raise ConfigError(f"options.decoder.sampler = {decoder.sampler!r}: only ddim comes back from an inversion")
    if decoder.eta not in (None, eta):
        raise ConfigError(f"options.decoder.eta = {decoder.eta:g}: the noise of a step is {eta:g} here; leave it null")
    if decoder.guidance.gradient_scales:
        guides = ", ".join(decoder.guidance.gradient_scales)
        raise ConfigError(f"options.decoder: guided by {guides}, which an inversion does not go through")
    changes: dict[str, object] = {"sampler": "ddim", "eta": eta}
    if decoder.timesteps_list is None:
        # Trailing steps leave out the least noise, where small errors of a prediction mean much of it: on a decoder of a few
        # minutes they halve the error of the picture that comes back, and x_T deviates by 2 in place of 20.
        changes["num_inference_steps"] = decoder.num_inference_steps or STEPS
        changes["timestep_spacing"] = decoder.timestep_spacing or "trailing"
    return options.merged({"decoder": changes})


@torch.no_grad()
def invert(
    pipeline: Pipeline, pictures: npt.NDArray[np.uint8] | torch.Tensor, *, options: GenerationOptions = AS_STORED
) -> Latents:
    """(z_i, x_T) of pictures uint8 (N, H, H, 3), H a multiple of the decoder's size.

    z_i is what CLIP says to them. x_T is found by DDIM upwards through the decoder, told z_i and no caption, guided as
    `options` say, whose eta does not count: DDIM without noise (`deterministic(options)`) comes back from it, up to an
    error that falls with the number of steps.
    """
    stage, options = pipeline.decoder, deterministic(options.merged({"decoder": {"eta": None}}))
    # A copy of arrays, which may be read-only.
    pixels = (pictures if isinstance(pictures, torch.Tensor) else torch.tensor(pictures)).to(pipeline.device)
    image_embed = pipeline.encode_image(pixels)
    sampling = pipeline.plan(options).sampling["decoder"]
    assert isinstance(sampling, SamplingConfig)
    timesteps = sampling.timesteps(stage.process.num_train_timesteps)
    at_once = max(1, options.max_pixels // stage.config.image_size**2)
    found = []
    captions: tuple[ConditionPart, ...] = ("text",)
    for start in range(0, len(pixels), at_once):
        x_start = to_signed(at_size(pixels[start : start + at_once], stage.config.image_size))
        unused = SampleGenerator(torch.arange(len(x_start), device=pipeline.device))  # its x_T is not looked at
        part = image_embed[start : start + at_once]
        cond = stage.begin(part, None, unused, dropped=captions).cond
        settings = MixedSampling([sampling] * len(x_start))
        if settings.needs_guidance:
            guided = settings.guided(stage.network, stage.process, pipeline.device)
            x_T = ddim_invert(guided, x_start, timesteps, stage.process, GuidedCondition.of(cond, stage.prepare))
        else:
            x_T = ddim_invert(stage.network, x_start, timesteps, stage.process, stage.prepare(cond))
        found.append(x_T)
    return Latents(image_embed, torch.cat(found))
