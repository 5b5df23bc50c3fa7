"""What stages a request runs, and how each of them samples: known before any weights are.

What the decoder is told decides what is in front of it: z_i needs CLIP and a prior, captions alone (GLIDE) nothing, and a
class (ADM) is what the prompt then is.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from unclip.config.base import Config, ConfigError
from unclip.models.text import CLIP_VOCABULARY
from unclip.pipelines.bundle import BundleError
from unclip.pipelines.guides import GuideOptions, check_guides
from unclip.pipelines.options import AnySampling, DecoderOptions, PriorOptions, SamplerOptions
from unclip.pipelines.stages import (
    AnyPriorStageConfig,
    ARPriorStageConfig,
    ClipStageConfig,
    DecoderStageConfig,
    NoisedClipStageConfig,
    StageConfig,
    StageName,
    UpsamplerStageConfig,
)

UpsamplerName = Literal["upsampler_256", "upsampler_1024"]
UPSAMPLERS: tuple[UpsamplerName, ...] = ("upsampler_256", "upsampler_1024")


class GenerationOptions(Config):
    """What a request may choose about the cascade."""

    up_to: int | None = Field(None, ge=1)
    """Side in pixels of the largest picture wanted; null for all stages of the bundle."""
    prior: PriorOptions = PriorOptions()
    """Changes for the prior."""
    decoder: DecoderOptions = DecoderOptions()
    """Changes for the decoder, and its guides."""
    upsampler_256: SamplerOptions = SamplerOptions()
    """Changes for the first upsampler."""
    upsampler_1024: SamplerOptions = SamplerOptions()
    """Changes for the second upsampler."""
    max_pixels: int = Field(1024 * 1024, ge=1)
    """Pixels of the pictures that go through a stage at once, at least one picture: a bound on memory."""


@dataclass(frozen=True)
class Cascade:
    """The stages that a request runs: how each samples, the side of its pictures, and what guides the decoder.

    `context_length` is the number of tokens, with start and end, of the longest prompt that no stage would cut; `classes`
    what a prompt may be where the decoder draws classes.
    """

    sampling: Mapping[StageName, AnySampling]
    sizes: Mapping[StageName, int]
    guidance: GuideOptions
    context_length: int
    classes: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """Plain JSON values of all that changes the pictures of a bundle, beside prompt, seed and precision."""
        sampling = {name: config.to_dict() for name, config in self.sampling.items()}
        return {"sampling": sampling, "guidance": self.guidance.to_dict()}


@dataclass(frozen=True)
class CascadeOutput:
    """What came out for B pictures: z_i (B, D) float32 of unit norm, and uint8 (B, S, S, 3) for each picture side S.

    `image_embed` is None where the decoder is not told any.
    """

    image_embed: torch.Tensor | None
    images: dict[int, npt.NDArray[np.uint8]]


def plan_cascade(
    configs: Mapping[StageName, StageConfig], options: GenerationOptions, *, with_prior: bool = True
) -> Cascade:
    """The stages that `options` ask for; without a prior where the image embeddings come from elsewhere.

    Raises `BundleError` where a stage is missing or does not take what the one before makes, and `ConfigError` where an
    option does not suit the stages.
    """
    decoder = configs.get("decoder")
    if not isinstance(decoder, DecoderStageConfig):
        raise BundleError(f"pictures need the stage decoder; the bundle has {', '.join(configs) or 'none'}")
    _check_vocabulary(decoder)
    prior = _prior_before(decoder, configs, with_prior)
    guidance = options.decoder.guidance
    check_guides(configs, decoder, guidance)
    sampling: dict[StageName, AnySampling] = {}
    if prior is not None:
        sampling["prior"] = options.prior.apply("options.prior", prior)
    sampling["decoder"] = options.decoder.apply("options.decoder", decoder)
    sizes: dict[StageName, int] = {"decoder": decoder.image_size}
    for name, upsampler in _upsamplers(configs, decoder.image_size, options.up_to).items():
        changes: SamplerOptions = getattr(options, name)
        sampling[name], sizes[name] = changes.apply(f"options.{name}", upsampler), upsampler.image_size
    if options.up_to not in (None, max(sizes.values())):
        raise ConfigError(
            f"options.up_to = {options.up_to}: the bundle makes {', '.join(map(str, sizes.values()))} pixels"
        )
    lengths = [decoder.model.context_length, None if prior is None else prior.model.context_length]
    noised_clip, clip = configs.get("noised_clip"), configs.get("clip")
    if isinstance(clip, ClipStageConfig) and decoder.in_clip_space:
        lengths.append(clip.architecture.context_length)
    if "noised_clip" in guidance.gradient_scales and isinstance(noised_clip, NoisedClipStageConfig):
        lengths.append(noised_clip.model.text.context_length)
    room = min((length for length in lengths if length is not None), default=sys.maxsize)
    return Cascade(sampling, sizes, guidance, room, decoder.classes)


def _check_vocabulary(decoder: DecoderStageConfig) -> None:
    """Refuses a decoder whose captions are tokens that nothing here makes of text, as GLIDE's are."""
    text = decoder.model.text
    if text is not None and text.vocab_size != CLIP_VOCABULARY:
        raise BundleError(
            f"the decoder's captions are tokens of another vocabulary (model.text.vocab_size = {text.vocab_size}) than CLIP's "
            "byte-pair encoding, so it cannot be asked by prompts; DecoderStage.sample takes tokens"
        )


def _prior_before(
    decoder: DecoderStageConfig, configs: Mapping[StageName, StageConfig], with_prior: bool
) -> AnyPriorStageConfig | None:
    """The prior that makes what the decoder is told; None where that is a caption or a class alone, or no prior is wanted."""
    told = set(decoder.model.inputs)
    sayable = {"image_embed", "tokens", "text_states", "known", "known_mask"}
    unknown = told - (sayable if told & sayable else {"label"})
    if unknown:
        raise BundleError(f"the decoder is told {', '.join(sorted(unknown))}, which a prompt does not say")
    if "image_embed" not in told or not with_prior:
        return None
    prior = configs.get("prior")
    if not isinstance(prior, AnyPriorStageConfig):
        raise BundleError(
            f"the decoder is told an image embedding, which needs the stage prior; the bundle has {', '.join(configs)}"
        )
    made = isinstance(prior, ARPriorStageConfig) or prior.unit_norm
    if made != decoder.unit_norm:
        raise BundleError(
            f"decoder.unit_norm = {decoder.unit_norm}: the prior makes embeddings {'of' if made else 'that are not of'} unit norm"
        )
    return prior


def _upsamplers(
    configs: Mapping[StageName, StageConfig], size: int, up_to: int | None
) -> dict[UpsamplerName, UpsamplerStageConfig]:
    """The upsamplers that follow one another from pictures of `size` to those of `up_to` pixels."""
    found: dict[UpsamplerName, UpsamplerStageConfig] = {}
    for name in UPSAMPLERS:
        upsampler = configs.get(name)
        if not isinstance(upsampler, UpsamplerStageConfig) or (up_to is not None and up_to <= size):
            continue
        if upsampler.low_res_size != size:
            raise BundleError(
                f"stage {name!r} takes pictures of {upsampler.low_res_size} pixels, the one before makes {size}; "
                f"add the stage between them, or set up_to = {size}"
            )
        found[name], size = upsampler, upsampler.image_size
    return found
