"""What a request may change about how a stage samples; what is null stays as the bundle has it."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from unclip.config.base import Config, ConfigError
from unclip.diffusion.respacing import TimestepSpacing
from unclip.diffusion.samplers import SamplerName, SamplingConfig
from unclip.pipelines.guides import GuideOptions
from unclip.pipelines.stages import (
    AnyPriorStageConfig,
    ARPriorStageConfig,
    ARSamplingConfig,
    DecoderStageConfig,
    UpsamplerStageConfig,
)

AnySampling = SamplingConfig | ARSamplingConfig

MAX_GUIDANCE_SCALE = 1000.0
"""Far beyond any use; without a bound, float32 overflows and there is no picture."""


class SamplerOptions(Config):
    """Changes to how a stage samples; what is null stays as the bundle has it."""

    sampler: SamplerName | None = None
    """Ancestral steps (ddpm), DDIM, or DPM-Solver++ (dpmsolver++, sde-dpmsolver++)."""
    num_inference_steps: int | None = Field(None, ge=1)
    """Number of network evaluations."""
    timestep_spacing: TimestepSpacing | None = None
    """Which timesteps are visited."""
    timesteps_list: tuple[int, ...] | None = None
    """The timesteps themselves, descending; they say how many there are."""
    eta: float | None = Field(None, ge=0, le=1)
    """Noise of a DDIM step."""

    def apply(self, field: str, stage: AnyPriorStageConfig | DecoderStageConfig | UpsamplerStageConfig) -> AnySampling:
        """The stage's sampling with these changes; `ConfigError` naming `field`, which they are the value of."""
        changes = {key: value for key, value in self.sampling_changes().items() if value is not None}
        if self.timesteps_list is not None:
            changes.setdefault("num_inference_steps", len(self.timesteps_list))
        elif {"num_inference_steps", "timestep_spacing"} & changes.keys():
            changes["timesteps_list"] = None  # a stored list would contradict them
        try:
            sampling = stage.sampling.merged(changes)
            if isinstance(sampling, SamplingConfig) and not isinstance(stage, ARPriorStageConfig):
                sampling.timesteps(stage.diffusion.num_train_timesteps)
        except ValueError as error:
            raise ConfigError(f"{field}: {error}") from None
        return sampling

    def sampling_changes(self) -> dict[str, Any]:
        """The fields that belong to the stage's sampling."""
        return self.to_dict()


class GuidedSamplerOptions(SamplerOptions):
    """Changes to how a stage with conditions samples; what is null stays as the bundle has it."""

    guidance_scale: float | None = Field(None, ge=0, le=MAX_GUIDANCE_SCALE)
    """Classifier-free guidance; 1 is off."""
    guidance_interval: tuple[float, float] | None = None
    """Guides only timesteps between these fractions of all, say 0.2 and 0.9."""


class PriorOptions(GuidedSamplerOptions):
    """Changes to how the prior samples; an autoregressive one knows guidance_scale and the two below alone."""

    temperature: float | None = Field(None, gt=0)
    """Divides the logits of an autoregressive prior's codes."""
    dot_percentile: float | None = Field(None, ge=0, lt=1)
    """An autoregressive prior draws the dot product with the text from above this share of its distribution."""


class DecoderOptions(GuidedSamplerOptions, GuideOptions):
    """Changes to how the decoder samples, and what else guides it."""

    def sampling_changes(self) -> dict[str, Any]:
        return {key: value for key, value in self.to_dict().items() if key not in GuideOptions.model_fields}

    @property
    def guidance(self) -> GuideOptions:
        """What guides it beside its conditions."""
        return GuideOptions.from_dict({name: getattr(self, name) for name in GuideOptions.model_fields})
