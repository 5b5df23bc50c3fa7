"""The cascade: caption -> text embedding -> prior -> decoder -> upsamplers (unCLIP §2), in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from unclip.config.base import Config, ConfigError
from unclip.diffusion.respacing import TimestepSpacing
from unclip.diffusion.samplers import Progress, SamplerName, SamplingConfig
from unclip.models.clip import ClipModel, Tokenizer
from unclip.pipelines.bundle import Bundle, BundleError
from unclip.pipelines.guides import DecoderGuide, GuideName, GuideOptions, build_guide, check_guides, combined_guide
from unclip.pipelines.pictures import to_signed, to_uint8
from unclip.pipelines.stages import (
    AnyPriorStage,
    AnyPriorStageConfig,
    ARPriorStageConfig,
    ARSamplingConfig,
    DecoderStage,
    DecoderStageConfig,
    NoisedClipStageConfig,
    StageConfig,
    StageName,
    UpsamplerStage,
    UpsamplerStageConfig,
)
from unclip.utils.random import SampleGenerator

StageProgress = Callable[[str, int, int], None]
"""progress(stage, steps done, steps in all), called after every sampling step."""

UpsamplerName = Literal["upsampler_256", "upsampler_1024"]
UPSAMPLERS: tuple[UpsamplerName, ...] = ("upsampler_256", "upsampler_1024")

AnySampling = SamplingConfig | ARSamplingConfig


class SamplerOptions(Config):
    """Changes to how a stage samples; what is null stays as the bundle has it."""

    sampler: SamplerName | None = None
    """Ancestral steps (ddpm), DDIM, or DPM-Solver++ (dpmsolver++, sde-dpmsolver++)."""
    num_inference_steps: int | None = Field(None, ge=1)
    """Number of network evaluations."""
    timestep_spacing: TimestepSpacing | None = None
    """Which timesteps are visited."""
    eta: float | None = Field(None, ge=0, le=1)
    """Noise of a DDIM step."""

    def apply(self, name: str, stage: AnyPriorStageConfig | DecoderStageConfig | UpsamplerStageConfig) -> AnySampling:
        """The stage's sampling with these changes; `ConfigError` naming the stage where they do not suit it."""
        changes = {key: value for key, value in self.sampling_changes().items() if value is not None}
        if {"num_inference_steps", "timestep_spacing"} & changes.keys():
            changes["timesteps_list"] = None  # a stored list would contradict them
        try:
            sampling = stage.sampling.merged(changes)
            if isinstance(sampling, SamplingConfig) and not isinstance(stage, ARPriorStageConfig):
                sampling.timesteps(stage.diffusion.num_train_timesteps)
        except ValueError as error:
            raise ConfigError(f"options.{name}: {error}") from None
        return sampling

    def sampling_changes(self) -> dict[str, Any]:
        """The fields that belong to the stage's sampling."""
        return self.to_dict()


class GuidedSamplerOptions(SamplerOptions):
    """Changes to how a stage with conditions samples; what is null stays as the bundle has it."""

    guidance_scale: float | None = Field(None, ge=0)
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


_AS_STORED = GenerationOptions()


@dataclass(frozen=True)
class Cascade:
    """The stages that a request runs: how each samples, the side of its pictures, and what guides the decoder.

    `context_length` is the number of tokens, with start and end, of the longest prompt that no stage would cut.
    """

    sampling: Mapping[StageName, AnySampling]
    sizes: Mapping[StageName, int]
    guidance: GuideOptions
    context_length: int

    @property
    def settings(self) -> dict[str, Any]:
        """Plain JSON values of all that changes the pictures of a bundle, beside prompt, seed and precision."""
        sampling = {name: config.to_dict() for name, config in self.sampling.items()}
        return {"sampling": sampling, "guidance": self.guidance.to_dict()}


@dataclass(frozen=True)
class CascadeOutput:
    """What came out for B prompts: z_i (B, D) float32 of unit norm, and uint8 (B, S, S, 3) for each picture side S."""

    image_embed: torch.Tensor
    images: dict[int, npt.NDArray[np.uint8]]


def plan_cascade(configs: Mapping[StageName, StageConfig], options: GenerationOptions) -> Cascade:
    """The stages that `options` ask for.

    Raises `BundleError` where a stage is missing or does not take what the one before makes, and `ConfigError` where an
    option does not suit the stages.
    """
    prior, decoder = configs.get("prior"), configs.get("decoder")
    if not isinstance(prior, AnyPriorStageConfig) or not isinstance(decoder, DecoderStageConfig):
        raise BundleError(f"pictures need the stages prior and decoder; the bundle has {', '.join(configs) or 'none'}")
    untold = set(decoder.model.inputs) - {"image_embed", "tokens", "known", "known_mask"}
    if untold:
        raise BundleError(f"the decoder is told {', '.join(sorted(untold))}, which a prompt does not say")
    guidance = options.decoder.guidance
    check_guides(configs, decoder, guidance)
    sampling: dict[StageName, AnySampling] = {
        "prior": options.prior.apply("prior", prior),
        "decoder": options.decoder.apply("decoder", decoder),
    }
    sizes: dict[StageName, int] = {"decoder": decoder.image_size}
    for name, upsampler in _upsamplers(configs, decoder.image_size, options.up_to).items():
        changes: SamplerOptions = getattr(options, name)
        sampling[name], sizes[name] = changes.apply(name, upsampler), upsampler.image_size
    if options.up_to not in (None, max(sizes.values())):
        raise ConfigError(
            f"options.up_to = {options.up_to}: the bundle makes {', '.join(map(str, sizes.values()))} pixels"
        )
    lengths = [prior.model.context_length, decoder.model.context_length]
    noised_clip = configs.get("noised_clip")
    if "noised_clip" in guidance.gradient_scales and isinstance(noised_clip, NoisedClipStageConfig):
        lengths.append(noised_clip.model.text.context_length)
    return Cascade(sampling, sizes, guidance, min(length for length in lengths if length is not None))


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


class Pipeline:
    """Pictures for prompts: the same for the same prompt and seed, alone or in any batch (within float tolerance).

    Args:
        clip: text encoder of the space that prior and decoder were trained in, on `device`.
        prior, decoder, upsamplers: the stages, on `device`; a stage of your own needs `config` and `sample`.
        guides: what the decoder may be guided by, on `device`.
    """

    def __init__(
        self,
        clip: ClipModel,
        prior: AnyPriorStage,
        decoder: DecoderStage,
        *,
        upsamplers: Mapping[UpsamplerName, UpsamplerStage],
        guides: Mapping[GuideName, DecoderGuide] = MappingProxyType({}),
        device: torch.device | str = "cpu",
    ) -> None:
        self.clip, self.prior, self.decoder = clip, prior, decoder
        self.upsamplers, self.guides = upsamplers, guides
        self.device = torch.device(device)

    @classmethod
    def from_bundle(
        cls,
        bundle: Bundle | str,
        device: torch.device | str = "cpu",
        *,
        dtype: torch.dtype = torch.float32,
        options: GenerationOptions = _AS_STORED,
    ) -> Pipeline:
        """Loads what `options` need of a bundle (or of the one at an address).

        Args:
            dtype: precision of the networks, float32 or bfloat16; CLIP and the samplers stay float32.
        """
        bundle = Bundle.load(bundle) if isinstance(bundle, str) else bundle
        cascade, configs = plan_cascade(bundle.configs, options), bundle.configs
        guiding = cascade.guidance.gradient_scales
        models = {name: bundle.load_model(name).to(device, dtype) for name in (*cascade.sampling, *guiding)}
        prior, decoder = configs["prior"], configs["decoder"]
        assert isinstance(prior, AnyPriorStageConfig)
        assert isinstance(decoder, DecoderStageConfig)
        upsamplers: dict[UpsamplerName, UpsamplerStage] = {}
        for name in UPSAMPLERS:
            config = configs.get(name)
            if name in models and isinstance(config, UpsamplerStageConfig):
                upsamplers[name] = UpsamplerStage(config, models[name])
        return cls(
            bundle.load_clip().to(device),
            prior.stage(models["prior"]),
            DecoderStage(decoder, models["decoder"]),
            upsamplers=upsamplers,
            guides={name: build_guide(configs[name], models[name]) for name in guiding},
            device=device,
        )

    @torch.no_grad()  # inference_mode would leave no way to take the gradients of guides
    def __call__(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        options: GenerationOptions = _AS_STORED,
        progress: StageProgress | None = None,
    ) -> CascadeOutput:
        """Pictures for `prompts`, each with its seed, of every size up to `options.up_to`."""
        if len(prompts) != len(seeds) or not prompts:
            raise ValueError(f"one seed for each prompt is needed, not {len(seeds)} seeds for {len(prompts)} prompts")
        cascade = plan_cascade(self._configs(), options)
        streams = SampleGenerator.for_samples(0, _seed_tensor(seeds), self.device)
        run = _Run(cascade, streams, options.max_pixels, progress)
        text_embed = self.clip.encode_text(self.clip.tokenize(prompts))
        tokens = self._tokens(prompts, self.prior.config.model.context_length)
        image_embed = run("prior", self.prior.sample, text_embed=text_embed, tokens=tokens)
        length = self.decoder.config.model.context_length
        told = {"image_embed": image_embed, "tokens": None if length is None else self._tokens(prompts, length)}
        targets = {
            name: self.guides[name].target(prompts, cascade.guidance) for name in cascade.guidance.gradient_scales
        }
        decode = partial(self._decode, cascade.guidance) if targets else self.decoder.sample
        pictures = to_uint8(run("decoder", decode, **told, **targets))
        images = {cascade.sizes["decoder"]: pictures}
        for name, upsampler in self.upsamplers.items():
            if name in cascade.sizes:
                # From 8 bits, as in training and in GLIDE: the next stage sees the picture that is handed out.
                pictures = to_uint8(run(name, upsampler.sample, low_res=to_signed(pictures)))
                images[cascade.sizes[name]] = pictures
        return CascadeOutput(image_embed.cpu(), {size: picture.cpu().numpy() for size, picture in images.items()})

    def _configs(self) -> dict[StageName, StageConfig]:
        configs: dict[StageName, StageConfig] = {"prior": self.prior.config, "decoder": self.decoder.config}
        configs |= {name: guide.config for name, guide in self.guides.items()}
        return configs | {name: stage.config for name, stage in self.upsamplers.items()}

    def _decode(self, guidance: GuideOptions, **inputs: Any) -> torch.Tensor:
        """The decoder's pictures where guides have targets, which come under their names."""
        terms = [
            (scale, self.guides[name].log_probability(inputs.pop(name)))
            for name, scale in guidance.gradient_scales.items()
        ]
        return self.decoder.sample(**inputs, guide=combined_guide(terms, self.decoder.config.diffusion.build()))

    def _tokens(self, prompts: Sequence[str], context_length: int) -> torch.Tensor:
        return torch.from_numpy(Tokenizer(None)(prompts, context_length)).to(self.device, torch.int64)


@dataclass(frozen=True)
class _Run:
    """One request on its way through the stages, as many pictures at once as memory is meant to hold."""

    cascade: Cascade
    streams: SampleGenerator
    max_pixels: int
    progress: StageProgress | None

    def __call__(
        self, name: StageName, sample: Callable[..., torch.Tensor], **inputs: torch.Tensor | None
    ) -> torch.Tensor:
        """What `sample` makes of `inputs`, each (B, ...) or None: micro-batches under one another."""
        keys = self.streams.child(name).keys
        at_once = max(1, self.max_pixels // self.cascade.sizes.get(name, 1) ** 2)
        starts = range(0, len(keys), at_once)
        outputs = []
        for index, start in enumerate(starts):
            part = slice(start, start + at_once)
            outputs.append(
                sample(
                    **{key: None if tensor is None else tensor[part] for key, tensor in inputs.items()},
                    generator=SampleGenerator(keys[part]),
                    sampling=self.cascade.sampling[name],
                    progress=self._progress_of(name, index, len(starts)),
                )
            )
        return torch.cat(outputs)

    def _progress_of(self, name: StageName, index: int, parts: int) -> Progress | None:
        """The progress of micro-batch `index` as a share of all `parts`."""
        report = self.progress
        if report is None:
            return None
        return lambda done, steps: report(name, index * steps + done, parts * steps)


def _seed_tensor(seeds: Sequence[int]) -> torch.Tensor:
    for seed in seeds:
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed {seed}: must fit into 64 bits")
    return torch.tensor(list(seeds), dtype=torch.int64)
