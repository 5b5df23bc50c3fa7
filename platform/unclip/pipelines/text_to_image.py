"""The cascade: caption -> text embedding -> prior -> decoder -> upsamplers (unCLIP §2), in plain PyTorch.

What the decoder is told decides what is in front of it: z_i needs CLIP and a prior, captions alone (GLIDE) nothing, and a
class (ADM) is what the prompt then is.
"""

from __future__ import annotations

import sys
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
from unclip.diffusion.samplers import Progress
from unclip.models.clip import ClipModel, Tokenizer
from unclip.pipelines.bundle import Bundle, BundleError
from unclip.pipelines.guides import (
    DecoderGuide,
    GuideName,
    GuideOptions,
    build_guide,
    check_guides,
    check_label,
    combined_guide,
)
from unclip.pipelines.options import AnySampling, DecoderOptions, PriorOptions, SamplerOptions
from unclip.pipelines.pictures import to_signed, to_uint8
from unclip.pipelines.stages import (
    AnyPriorStage,
    AnyPriorStageConfig,
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
    """What came out for B prompts: z_i (B, D) float32 of unit norm, and uint8 (B, S, S, 3) for each picture side S.

    `image_embed` is None where the decoder is not told any.
    """

    image_embed: torch.Tensor | None
    images: dict[int, npt.NDArray[np.uint8]]


def plan_cascade(configs: Mapping[StageName, StageConfig], options: GenerationOptions) -> Cascade:
    """The stages that `options` ask for.

    Raises `BundleError` where a stage is missing or does not take what the one before makes, and `ConfigError` where an
    option does not suit the stages.
    """
    decoder = configs.get("decoder")
    if not isinstance(decoder, DecoderStageConfig):
        raise BundleError(f"pictures need the stage decoder; the bundle has {', '.join(configs) or 'none'}")
    prior = _prior_before(decoder, configs)
    guidance = options.decoder.guidance
    check_guides(configs, decoder, guidance)
    sampling: dict[StageName, AnySampling] = {}
    if prior is not None:
        sampling["prior"] = options.prior.apply("prior", prior)
    sampling["decoder"] = options.decoder.apply("decoder", decoder)
    sizes: dict[StageName, int] = {"decoder": decoder.image_size}
    for name, upsampler in _upsamplers(configs, decoder.image_size, options.up_to).items():
        changes: SamplerOptions = getattr(options, name)
        sampling[name], sizes[name] = changes.apply(name, upsampler), upsampler.image_size
    if options.up_to not in (None, max(sizes.values())):
        raise ConfigError(
            f"options.up_to = {options.up_to}: the bundle makes {', '.join(map(str, sizes.values()))} pixels"
        )
    lengths = [decoder.model.context_length, None if prior is None else prior.model.context_length]
    noised_clip = configs.get("noised_clip")
    if "noised_clip" in guidance.gradient_scales and isinstance(noised_clip, NoisedClipStageConfig):
        lengths.append(noised_clip.model.text.context_length)
    room = min((length for length in lengths if length is not None), default=sys.maxsize)
    return Cascade(sampling, sizes, guidance, room, decoder.classes)


def _prior_before(decoder: DecoderStageConfig, configs: Mapping[StageName, StageConfig]) -> AnyPriorStageConfig | None:
    """The prior that makes what the decoder is told; None where that is a caption or a class alone."""
    told = set(decoder.model.inputs)
    sayable = {"image_embed", "tokens", "text_states", "known", "known_mask"}
    unknown = told - (sayable if told & sayable else {"label"})
    if unknown:
        raise BundleError(f"the decoder is told {', '.join(sorted(unknown))}, which a prompt does not say")
    if "image_embed" not in told:
        return None
    prior = configs.get("prior")
    if not isinstance(prior, AnyPriorStageConfig):
        raise BundleError(
            f"the decoder is told an image embedding, which needs the stage prior; the bundle has {', '.join(configs)}"
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


class Pipeline:
    """Pictures for prompts: the same for the same prompt and seed, alone or in any batch (within float tolerance).

    Args:
        decoder, prior, upsamplers: the stages, on `device`; a stage of your own needs `config` and `sample`.
        clip: text encoder of the space that prior and decoder were trained in, on `device`. It and the prior are there for
            decoders that are told an image embedding, it alone for those told CLIP's text states.
        guides: what the decoder may be guided by, on `device`.
    """

    def __init__(
        self,
        decoder: DecoderStage,
        *,
        clip: ClipModel | None = None,
        prior: AnyPriorStage | None = None,
        upsamplers: Mapping[UpsamplerName, UpsamplerStage],
        guides: Mapping[GuideName, DecoderGuide] = MappingProxyType({}),
        device: torch.device | str = "cpu",
    ) -> None:
        told = decoder.config.model.inputs
        if (clip is None and decoder.config.in_clip_space) or (prior is None and "image_embed" in told):
            raise ValueError(f"a decoder that is told {', '.join(told)} needs clip, and prior for an image embedding")
        states = decoder.config.model.text_states
        if clip is not None and states is not None and states.context_length != clip.context_length:
            raise ValueError(
                f"the decoder takes the states of {states.context_length} tokens; its CLIP has {clip.context_length}"
            )
        self.decoder, self.clip, self.prior = decoder, clip, prior
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
        decoder, prior = configs["decoder"], configs.get("prior")
        assert isinstance(decoder, DecoderStageConfig)
        upsamplers: dict[UpsamplerName, UpsamplerStage] = {}
        for name in UPSAMPLERS:
            config = configs.get(name)
            if name in models and isinstance(config, UpsamplerStageConfig):
                upsamplers[name] = UpsamplerStage(config, models[name])
        return cls(
            DecoderStage(decoder, models["decoder"]),
            clip=bundle.load_clip().to(device) if decoder.in_clip_space else None,
            prior=prior.stage(models["prior"])
            if isinstance(prior, AnyPriorStageConfig) and "prior" in models
            else None,
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
        """Pictures for `prompts`, each with its seed, of every size up to `options.up_to`.

        A prompt is a caption, or for a decoder of classes one of their names; `ConfigError` where it is none.
        """
        if len(prompts) != len(seeds) or not prompts:
            raise ValueError(f"one seed for each prompt is needed, not {len(seeds)} seeds for {len(prompts)} prompts")
        cascade = plan_cascade(self._configs(), options)
        streams = SampleGenerator.for_samples(0, _seed_tensor(seeds), self.device)
        run = _Run(cascade, streams, options.max_pixels, progress)
        image_embed = self._image_embed(prompts, run) if "prior" in cascade.sampling else None
        told = {"image_embed": image_embed, **self._told(prompts)}
        targets = {
            name: self.guides[name].target(prompts, cascade.guidance) for name in cascade.guidance.gradient_scales
        }
        pictures = to_uint8(run("decoder", partial(self._decode, cascade.guidance), **told, **targets))
        images = {cascade.sizes["decoder"]: pictures}
        for name, upsampler in self.upsamplers.items():
            if name in cascade.sizes:
                # From 8 bits, as in training and in GLIDE: the next stage sees the picture that is handed out.
                pictures = to_uint8(run(name, upsampler.sample, low_res=to_signed(pictures)))
                images[cascade.sizes[name]] = pictures
        return CascadeOutput(
            None if image_embed is None else image_embed.cpu(),
            {size: picture.cpu().numpy() for size, picture in images.items()},
        )

    def _configs(self) -> dict[StageName, StageConfig]:
        configs: dict[StageName, StageConfig] = {"decoder": self.decoder.config}
        if self.prior is not None:
            configs["prior"] = self.prior.config
        configs |= {name: guide.config for name, guide in self.guides.items()}
        return configs | {name: stage.config for name, stage in self.upsamplers.items()}

    def _image_embed(self, prompts: Sequence[str], run: _Run) -> torch.Tensor:
        """z_i (B, D) of the prompts."""
        assert self.clip is not None
        assert self.prior is not None
        text_embed = self.clip.encode_text(self.clip.tokenize(prompts))
        tokens = self._tokens(prompts, self.prior.config.model.context_length)
        return run("prior", self.prior.sample, text_embed=text_embed, tokens=tokens)

    def _told(self, prompts: Sequence[str]) -> dict[str, torch.Tensor | None]:
        """What the decoder is told of the prompts themselves: tokens, CLIP's states of them, or the class that they name."""
        config = self.decoder.config
        length = config.model.context_length
        told = {"tokens": None if length is None else self._tokens(prompts, length)}
        if config.model.num_classes is not None:
            told["label"] = _labels(prompts, config.classes).to(self.device)
        if config.model.text_states is not None:
            assert self.clip is not None
            told["text_states"] = self.clip.encode_text_states(self.clip.tokenize(prompts))[1]
        return told

    def _decode(self, guidance: GuideOptions, **inputs: Any) -> torch.Tensor:
        """The decoder's pictures; the targets of guides come under the guides' names."""
        terms = [
            (scale, self.guides[name].log_probability(inputs.pop(name)))
            for name, scale in guidance.gradient_scales.items()
        ]
        guide = combined_guide(terms, self.decoder.config.diffusion.build()) if terms else None
        further: dict[str, Any] = {name: inputs.pop(name) for name in ("label", "text_states") if name in inputs}
        return self.decoder.sample(**inputs, further=further, guide=guide)

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


def _labels(prompts: Sequence[str], classes: Sequence[str]) -> torch.Tensor:
    """(B,) int64: the position among `classes` of the one that each prompt names."""
    for prompt in prompts:
        check_label("prompt", prompt, classes)
    return torch.tensor([classes.index(prompt) for prompt in prompts])


def _seed_tensor(seeds: Sequence[int]) -> torch.Tensor:
    for seed in seeds:
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed {seed}: must fit into 64 bits")
    return torch.tensor(list(seeds), dtype=torch.int64)
