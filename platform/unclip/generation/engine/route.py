"""The loaded stages of an engine, and which of them a request goes through."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import nn

from unclip.config.base import ConfigError
from unclip.generation.engine.request import EncodedCaption, Picture, Request
from unclip.models.clip import ClipModel
from unclip.pipelines.bundle import Bundle, BundleError
from unclip.pipelines.cascade import UPSAMPLERS, Cascade, GenerationOptions, plan_cascade
from unclip.pipelines.guides import DecoderGuide, GuideName, GuideOptions, build_guide, check_label
from unclip.pipelines.inversion import deterministic
from unclip.pipelines.known import KnownPixels
from unclip.pipelines.options import AnySampling
from unclip.pipelines.pictures import PICTURE_CHANNELS
from unclip.pipelines.pipeline import Pipeline
from unclip.pipelines.stages import (
    AnyPriorStage,
    AnyPriorStageConfig,
    DecoderStage,
    DecoderStageConfig,
    StageConfig,
    StageName,
    UpsamplerStage,
    UpsamplerStageConfig,
)
from unclip.pipelines.stages.checks import check_unit_norm

AnyStage = AnyPriorStage | DecoderStage | UpsamplerStage
Configs = Mapping[StageName, StageConfig]

_MAX_PROMPT_CHARACTERS = 2000
"""Far beyond any context length; the tokenizer's work is bounded with it."""


@dataclass(frozen=True)
class Stages:
    """What an engine runs, in the order of the cascade, with what encodes captions and what guides the decoder.

    `bundle` are the configurations of all stages of the cascade that these are a part of; None where these are all.
    """

    by_name: Mapping[StageName, AnyStage]
    clip: ClipModel | None = None
    guides: Mapping[GuideName, DecoderGuide] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    bundle: Configs | None = None

    @classmethod
    def of(cls, pipeline: Pipeline) -> Stages:
        """Those of a pipeline."""
        found: dict[StageName, AnyStage] = {} if pipeline.prior is None else {"prior": pipeline.prior}
        found["decoder"] = pipeline.decoder
        found.update((name, pipeline.upsamplers[name]) for name in pipeline.upsamplers)
        return cls(found, pipeline.clip, pipeline.guides, pipeline.device)

    @classmethod
    def load(
        cls,
        bundle: Bundle,
        names: Collection[StageName],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        options: GenerationOptions | None = None,
    ) -> Stages:
        """Some stages of a bundle, of whose weights no others are read.

        Args:
            names: prior, decoder, upsamplers, and clip for the CLIP of the bundle, be it a stage or a name.
            dtype: precision of the networks, float32 or bfloat16; CLIP and the samplers stay float32.
            options: those guides that they turn on come with the decoder; None for none.

        Raises `BundleError` where the bundle has no such stage, or is damaged.
        """
        device = torch.device(device)
        loaded = {
            name: bundle.load_model(name).to(device, dtype) for name in bundle.configs if name in _RUN & set(names)
        }
        missing = [name for name in names if name not in loaded and name != "clip"]
        if missing:
            raise BundleError(
                f"{bundle.uri!r}: an engine cannot load {', '.join(missing)} of {', '.join(bundle.configs)}"
            )
        on = {} if options is None or "decoder" not in names else options.decoder.guidance.gradient_scales
        return cls(
            {name: _build_stage(bundle.configs[name], model) for name, model in loaded.items()},
            bundle.load_clip().to(device) if "clip" in names else None,
            {name: build_guide(bundle.configs[name], bundle.load_model(name).to(device, dtype)) for name in on},
            device,
            bundle.configs,
        )

    @cached_property
    def configs(self) -> Configs:
        """Of the whole cascade, as far as it is known here: of every part of a bundle the same."""
        if self.bundle is not None:
            return self.bundle
        configs: dict[StageName, StageConfig] = {name: stage.config for name, stage in self.by_name.items()}
        return configs | {name: guide.config for name, guide in self.guides.items()}

    @property
    def networks(self) -> Mapping[StageName, nn.Module]:
        """All that are loaded."""
        found: dict[StageName, nn.Module] = {} if self.clip is None else {"clip": self.clip}
        found |= {name: guide.network for name, guide in self.guides.items()}
        return found | {name: stage.network for name, stage in self.by_name.items()}


def _build_stage(config: StageConfig, model: nn.Module) -> AnyStage:
    if isinstance(config, DecoderStageConfig):
        return DecoderStage(config, model)
    if isinstance(config, UpsamplerStageConfig):
        return UpsamplerStage(config, model)
    assert isinstance(config, AnyPriorStageConfig)
    return config.stage(model)


_RUN: frozenset[StageName] = frozenset({"prior", "decoder", *UPSAMPLERS})
"""What an engine takes steps of."""


def stage_after(route: Cascade, name: StageName) -> StageName | None:
    """The stage that takes what stage `name` makes; None behind the last."""
    names = list(route.sampling)
    return next(iter(names[names.index(name) + 1 :]), None)


def part_of_a_cascade(
    sampling: Mapping[StageName, AnySampling], sizes: Mapping[StageName, int], guidance: GuideOptions | None = None
) -> Cascade:
    """Some stages alone, without a caption that they could cut."""
    return Cascade(sampling, sizes, GuideOptions() if guidance is None else guidance, context_length=sys.maxsize)


def plan_route(request: Request, stages: Stages) -> Cascade:
    """The stages that `request` goes through in an engine of `stages`: `plan_request`, and they are all there.

    Raises what `plan_request` raises, `BundleError` where a stage or a guide is not loaded, and `ConfigError` where a CLIP
    is missing.
    """
    route = plan_request(request, stages.configs)
    missing = [name for name in route.sampling if name not in stages.by_name]
    if "decoder" in route.sampling:
        missing += [name for name in route.guidance.gradient_scales if name not in stages.guides]
    if missing:
        there = ", ".join((*stages.by_name, *stages.guides)) or "none"
        raise BundleError(
            f"the request goes through {', '.join(missing)}; of the stages, this engine has loaded {there}"
        )
    if stages.clip is None and _reads_encodings(route, stages.configs):
        texts = {"prompt": (request.prompt, request.encoded)}
        texts["negative_prompt"] = request.negative_prompt, request.negative_encoded
        for name, (text, encoded) in texts.items():
            if text is not None and encoded is None:
                raise ConfigError(f"{name}: needs a CLIP, and this engine has none; give its encoding")
    return route


def plan_request(request: Request, configs: Configs) -> Cascade:
    """The stages that `request` goes through, or of `request.stages` those, in a bundle of `configs`; no weights are needed.

    Raises `ConfigError` or `ValueError` naming what does not suit them, and `BundleError` where a stage is missing.
    """
    if not -(2**63) <= request.seed < 2**63:
        raise ValueError(f"seed {request.seed}: must fit into 64 bits")
    if request.timeout is not None and not request.timeout > 0:
        raise ValueError(f"timeout = {request.timeout}: must be above 0 seconds")
    for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
        if len(text or "") > _MAX_PROMPT_CHARACTERS:
            raise ValueError(f"{name} has {len(text or '')} characters; at most {_MAX_PROMPT_CHARACTERS} are allowed")
    if request.inverts is not None:
        way = _upwards(request, request.inverts, configs)
    elif request.low_res is None:
        way = _from_decoder(request, request.options, configs)
    elif request.image_embed is None:
        way = _from_picture(request, request.low_res, configs)
    else:
        raise ValueError("image_embed and low_res: give one, which says where the request begins")
    _check_beginning(request, way)
    for size, known in request.known.items():
        _check_known(size, known, way)
    route = _part(way, request.stages)
    _check_encoded("encoded", request.prompt, request.encoded, route, configs)
    _check_encoded("negative_encoded", request.negative_prompt, request.negative_encoded, route, configs)
    return route


def _part(way: Cascade, names: tuple[StageName, ...] | None) -> Cascade:
    """Of the stages of a way its first ones, which are those named."""
    if names is None:
        return way
    if not names or names != tuple(way.sampling)[: len(names)]:
        raise ConfigError(
            f"stages = {', '.join(names) or 'none'}: the request goes through {', '.join(way.sampling)}; "
            "name the first of these, or give it what they would have made"
        )
    sampling = {name: way.sampling[name] for name in names}
    sizes = {name: size for name, size in way.sizes.items() if name in names}
    return dataclasses.replace(way, sampling=sampling, sizes=sizes)


def _decoder_of(configs: Configs) -> DecoderStageConfig:
    """Of configurations that `plan_cascade` has seen."""
    decoder = configs["decoder"]
    assert isinstance(decoder, DecoderStageConfig)
    return decoder


def _from_decoder(request: Request, options: GenerationOptions, configs: Configs) -> Cascade:
    """With the prior in front of it where z_i is not given, unless the decoder shall do without."""
    embed = request.image_embed
    begins_with_it = request.stages is not None and request.stages[:1] == ("decoder",)
    cascade = plan_cascade(configs, options, with_prior=embed is None and not begins_with_it)
    width = _decoder_of(configs).model.embed_dim
    if embed is not None:
        if width is None:
            raise ValueError("image_embed is given, but the decoder is told none")
        _check_embed("image_embed", embed, width, unit_norm=_decoder_of(configs).unit_norm)
    if cascade.classes and request.negative_prompt is not None:
        raise ConfigError(f"negative_prompt = {request.negative_prompt!r}: the decoder knows classes, and no captions")
    if request.prompt is None:
        if embed is None:
            raise ValueError("prompt, image_embed, low_res: none is given; a request begins with one of them")
        if "noised_clip" in cascade.guidance.gradient_scales:
            raise ConfigError("options.decoder.clip_guidance_scale: guides towards a prompt, and there is none")
    elif cascade.classes:
        check_label("prompt", request.prompt, cascade.classes)
    return cascade


def _upwards(request: Request, picture: Picture, configs: Configs) -> Cascade:
    """The decoder alone, as it comes back from an inversion."""
    given = {"low_res": request.low_res, "x_T": request.x_T, "known": request.known or None}
    others = [name for name, value in given.items() if value is not None]
    if others or request.image_embed is None:
        raise ValueError(f"inverts: goes with image_embed, not with {', '.join(others) or 'none'}")
    options = deterministic(request.options.merged({"decoder": {"eta": None}}))
    way = _part(_from_decoder(request, options, configs), ("decoder",))
    expected = (way.sizes["decoder"], way.sizes["decoder"], PICTURE_CHANNELS)
    if picture.dtype != np.uint8 or picture.shape != expected:
        raise ValueError(f"inverts must be uint8 {expected}, not {picture.dtype} {picture.shape}")
    return way


def _from_picture(request: Request, low_res: Picture, configs: Configs) -> Cascade:
    """The upsamplers from the one that takes the picture on."""
    if low_res.dtype != np.uint8 or low_res.ndim != 3 or low_res.shape[2] != PICTURE_CHANNELS:
        raise ValueError(f"low_res must be uint8 (s, s, 3), not {low_res.dtype} {low_res.shape}")
    size, up_to = low_res.shape[0], request.options.up_to
    sampling: dict[StageName, AnySampling] = {}
    sizes: dict[StageName, int] = {}
    for name in UPSAMPLERS:
        config = configs.get(name)
        if isinstance(config, UpsamplerStageConfig) and config.low_res_size == size and (up_to is None or size < up_to):
            sampling[name] = getattr(request.options, name).apply(f"options.{name}", config)
            sizes[name] = size = config.image_size
    if not sampling or low_res.shape[1] != low_res.shape[0]:
        raise ValueError(
            f"low_res is {low_res.shape[0]} x {low_res.shape[1]}: no upsampler takes it to up_to = {up_to}"
        )
    if up_to not in (None, size):
        raise ConfigError(f"options.up_to = {up_to}: from {low_res.shape[0]} pixels the stages reach {size}")
    return part_of_a_cascade(sampling, sizes)


def _check_beginning(request: Request, route: Cascade) -> None:
    if request.x_T is None:
        return
    if "decoder" not in route.sampling:
        raise ValueError("x_T is given, but the request begins behind the decoder")
    size = route.sizes["decoder"]
    if tuple(request.x_T.shape) != (PICTURE_CHANNELS, size, size):
        raise ValueError(f"x_T must be ({PICTURE_CHANNELS}, {size}, {size}), not {tuple(request.x_T.shape)}")
    if not request.x_T.is_floating_point() or not bool(request.x_T.isfinite().all()):
        raise ValueError(f"x_T must be of finite floating point numbers; it is {request.x_T.dtype}")


def _check_known(size: int, known: KnownPixels, route: Cascade) -> None:
    if size not in route.sizes.values():
        raise ValueError(f"known: no stage of this request makes pictures of {size} pixels")
    if tuple(known.mask.shape) != (1, size, size):
        raise ValueError(f"known[{size}]: mask must be (1, {size}, {size}), not {tuple(known.mask.shape)}")
    if not 0 <= known.feather <= size:
        raise ValueError(f"known[{size}]: feather = {known.feather} must be from 0 to {size} pixels")


def _reads_encodings(route: Cascade, configs: Configs) -> bool:
    """Whether stages on the way are told what CLIP makes of captions."""
    states = "decoder" in route.sampling and _decoder_of(configs).model.text_states is not None
    return states or "prior" in route.sampling


def _check_encoded(
    name: str, text: str | None, encoded: EncodedCaption | None, route: Cascade, configs: Configs
) -> None:
    """Whether an encoding has what the stages on the way are told of it."""
    if encoded is None:
        return
    if text is None:
        raise ValueError(f"{name} is given without what it is the encoding of")
    prior = configs.get("prior")
    if "prior" in route.sampling and isinstance(prior, AnyPriorStageConfig):
        _check_embed(f"{name}.text_embed", encoded.text_embed, prior.model.embed_dim, unit_norm=True)
    states = _decoder_of(configs).model.text_states if "decoder" in route.sampling else None
    if states is not None:
        expected, found = (states.context_length, states.state_dim), encoded.text_states
        if found is None or tuple(found.shape) != expected or not bool(found.isfinite().all()):
            shape = None if found is None else tuple(found.shape)
            raise ValueError(f"{name}.text_states must be {expected} of finite numbers, and is {shape}")


def _check_embed(name: str, embed: torch.Tensor, width: int, *, unit_norm: bool) -> None:
    if tuple(embed.shape) != (width,):
        raise ValueError(f"{name} must be ({width},), not {tuple(embed.shape)}")
    if unit_norm:
        check_unit_norm(name, embed[None])
