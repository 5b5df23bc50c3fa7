"""The cascade: caption -> text embedding -> prior -> decoder -> upsamplers (unCLIP §2), in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from unclip.config.base import Config, ConfigError
from unclip.diffusion.respacing import TimestepSpacing
from unclip.diffusion.samplers import Progress, SamplingConfig
from unclip.models.clip import ClipModel, Tokenizer
from unclip.pipelines.bundle import Bundle, BundleError
from unclip.pipelines.pictures import to_signed, to_uint8
from unclip.pipelines.stages import (
    DecoderStage,
    DecoderStageConfig,
    PriorStage,
    PriorStageConfig,
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


class SamplerOptions(Config):
    """Changes to how a stage samples; what is null stays as the bundle has it."""

    sampler: Literal["ddpm", "ddim"] | None = None
    """Ancestral steps (ddpm) or DDIM."""
    num_inference_steps: int | None = Field(None, ge=1)
    """Number of network evaluations."""
    timestep_spacing: TimestepSpacing | None = None
    """Which timesteps are visited."""
    eta: float | None = Field(None, ge=0, le=1)
    """Noise of a DDIM step."""

    def apply(self, name: str, stage: PriorStageConfig | DecoderStageConfig | UpsamplerStageConfig) -> SamplingConfig:
        """The stage's sampling with these changes; `ConfigError` naming the stage where they do not suit it."""
        changes = {key: value for key, value in self.to_dict().items() if value is not None}
        try:
            sampling = stage.sampling.merged(changes)
            sampling.timesteps(stage.diffusion.num_train_timesteps)
        except ValueError as error:
            raise ConfigError(f"options.{name}: {error}") from None
        return sampling


class GuidedSamplerOptions(SamplerOptions):
    """Changes to how a stage with conditions samples; what is null stays as the bundle has it."""

    guidance_scale: float | None = Field(None, ge=0)
    """Classifier-free guidance; 1 is off."""


class GenerationOptions(Config):
    """What a request may choose about the cascade."""

    up_to: int | None = Field(None, ge=1)
    """Side in pixels of the largest picture wanted; null for all stages of the bundle."""
    prior: GuidedSamplerOptions = GuidedSamplerOptions()
    """Changes for the prior."""
    decoder: GuidedSamplerOptions = GuidedSamplerOptions()
    """Changes for the decoder."""
    upsampler_256: SamplerOptions = SamplerOptions()
    """Changes for the first upsampler."""
    upsampler_1024: SamplerOptions = SamplerOptions()
    """Changes for the second upsampler."""
    max_pixels: int = Field(1024 * 1024, ge=1)
    """Pixels of the pictures that go through a stage at once, at least one picture: a bound on memory."""


_AS_STORED = GenerationOptions()


@dataclass(frozen=True)
class Cascade:
    """The stages that a request runs: how each samples, and the side of its pictures."""

    sampling: Mapping[StageName, SamplingConfig]
    sizes: Mapping[StageName, int]


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
    if not isinstance(prior, PriorStageConfig) or not isinstance(decoder, DecoderStageConfig):
        raise BundleError(f"pictures need the stages prior and decoder; the bundle has {', '.join(configs) or 'none'}")
    sampling: dict[StageName, SamplingConfig] = {
        "prior": options.prior.apply("prior", prior),
        "decoder": options.decoder.apply("decoder", decoder),
    }
    sizes: dict[StageName, int] = {"decoder": decoder.image_size}
    size = decoder.image_size
    for name in UPSAMPLERS:
        upsampler = configs.get(name)
        if not isinstance(upsampler, UpsamplerStageConfig) or (options.up_to is not None and options.up_to <= size):
            continue
        if upsampler.low_res_size != size:
            raise BundleError(
                f"stage {name!r} takes pictures of {upsampler.low_res_size} pixels, the one before makes {size}; "
                f"add the stage between them, or set up_to = {size}"
            )
        changes: SamplerOptions = getattr(options, name)
        sampling[name], sizes[name] = changes.apply(name, upsampler), upsampler.image_size
        size = upsampler.image_size
    if options.up_to not in (None, size):
        raise ConfigError(
            f"options.up_to = {options.up_to}: the bundle makes {', '.join(map(str, sizes.values()))} pixels"
        )
    return Cascade(sampling=sampling, sizes=sizes)


class Pipeline:
    """Pictures for prompts: the same for the same prompt and seed, alone or in any batch (within float tolerance).

    Args:
        clip: text encoder of the space that prior and decoder were trained in, on `device`.
        prior, decoder, upsamplers: the stages, on `device`; a stage of your own needs `config` and `sample`.
    """

    def __init__(
        self,
        clip: ClipModel,
        prior: PriorStage,
        decoder: DecoderStage,
        *,
        upsamplers: Mapping[UpsamplerName, UpsamplerStage],
        device: torch.device | str = "cpu",
    ) -> None:
        self.clip, self.prior, self.decoder, self.upsamplers = clip, prior, decoder, upsamplers
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
        models = {name: bundle.load_model(name).to(device, dtype) for name in cascade.sampling}
        prior, decoder = configs["prior"], configs["decoder"]
        assert isinstance(prior, PriorStageConfig)
        assert isinstance(decoder, DecoderStageConfig)
        upsamplers: dict[UpsamplerName, UpsamplerStage] = {}
        for name in UPSAMPLERS:
            config = configs.get(name)
            if name in models and isinstance(config, UpsamplerStageConfig):
                upsamplers[name] = UpsamplerStage(config, models[name])
        return cls(
            bundle.load_clip().to(device),
            PriorStage(prior, models["prior"]),
            DecoderStage(decoder, models["decoder"]),
            upsamplers=upsamplers,
            device=device,
        )

    @torch.inference_mode()
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
        configs: dict[StageName, StageConfig] = {"prior": self.prior.config, "decoder": self.decoder.config}
        configs.update({name: stage.config for name, stage in self.upsamplers.items()})
        cascade = plan_cascade(configs, options)
        streams = SampleGenerator.for_samples(0, _seed_tensor(seeds), self.device)
        run = _Run(cascade, streams, options.max_pixels, progress)
        text_embed = self.clip.encode_text(self.clip.tokenize(prompts))
        tokens = self._tokens(prompts, self.prior.config.model.context_length)
        image_embed = run("prior", self.prior.sample, text_embed, tokens)
        tokens = self._tokens(prompts, self.decoder.config.model.text.context_length)
        pictures = to_uint8(run("decoder", self.decoder.sample, image_embed, tokens))
        images = {cascade.sizes["decoder"]: pictures}
        for name, upsampler in self.upsamplers.items():
            if name in cascade.sizes:
                # From 8 bits, as in training and in GLIDE: the next stage sees the picture that is handed out.
                pictures = to_uint8(run(name, upsampler.sample, to_signed(pictures)))
                images[cascade.sizes[name]] = pictures
        return CascadeOutput(image_embed.cpu(), {size: picture.cpu().numpy() for size, picture in images.items()})

    def _tokens(self, prompts: Sequence[str], context_length: int) -> torch.Tensor:
        return torch.from_numpy(Tokenizer(None)(prompts, context_length)).to(self.device, torch.int64)


@dataclass(frozen=True)
class _Run:
    """One request on its way through the stages, as many pictures at once as memory is meant to hold."""

    cascade: Cascade
    streams: SampleGenerator
    max_pixels: int
    progress: StageProgress | None

    def __call__(self, name: StageName, sample: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        """What `sample` makes of `inputs` (B, ...): micro-batches under one another."""
        count = len(inputs[0])
        at_once = max(1, self.max_pixels // self.cascade.sizes.get(name, 1) ** 2)
        starts, keys = range(0, count, at_once), self.streams.child(name).keys
        outputs = []
        for index, start in enumerate(starts):
            part = slice(start, start + at_once)
            outputs.append(
                sample(
                    *(tensor[part] for tensor in inputs),
                    SampleGenerator(keys[part]),
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
