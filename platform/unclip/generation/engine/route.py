"""The loaded stages of an engine, and which of them a request goes through."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from unclip.config.base import ConfigError
from unclip.generation.engine.request import Picture, Request
from unclip.models.clip import ClipModel
from unclip.pipelines.cascade import UPSAMPLERS, Cascade, plan_cascade
from unclip.pipelines.guides import DecoderGuide, GuideName, GuideOptions, check_label
from unclip.pipelines.known import KnownPixels
from unclip.pipelines.options import AnySampling
from unclip.pipelines.pictures import PICTURE_CHANNELS
from unclip.pipelines.pipeline import Pipeline
from unclip.pipelines.stages import AnyPriorStage, DecoderStage, StageConfig, StageName, UpsamplerStage
from unclip.pipelines.stages.checks import check_unit_norm

AnyStage = AnyPriorStage | DecoderStage | UpsamplerStage

_MAX_PROMPT_CHARACTERS = 2000
"""Far beyond any context length; the tokenizer's work is bounded with it."""


@dataclass(frozen=True)
class Stages:
    """What an engine runs, in the order of the cascade, with what encodes captions and what guides the decoder."""

    by_name: Mapping[StageName, AnyStage]
    clip: ClipModel | None = None
    guides: Mapping[GuideName, DecoderGuide] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of(cls, pipeline: Pipeline) -> Stages:
        """Those of a pipeline."""
        found: dict[StageName, AnyStage] = {} if pipeline.prior is None else {"prior": pipeline.prior}
        found["decoder"] = pipeline.decoder
        found.update((name, pipeline.upsamplers[name]) for name in pipeline.upsamplers)
        return cls(found, pipeline.clip, pipeline.guides, pipeline.device)

    @cached_property
    def configs(self) -> Mapping[StageName, StageConfig]:
        """Of all of them."""
        configs: dict[StageName, StageConfig] = {name: stage.config for name, stage in self.by_name.items()}
        return configs | {name: guide.config for name, guide in self.guides.items()}


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
    """The stages that `request` goes through.

    Raises `ConfigError` or `ValueError` naming what does not suit them, and `BundleError` where a stage is missing.
    """
    if not -(2**63) <= request.seed < 2**63:
        raise ValueError(f"seed {request.seed}: must fit into 64 bits")
    if len(request.prompt or "") > _MAX_PROMPT_CHARACTERS:
        raise ValueError(
            f"prompt has {len(request.prompt or '')} characters; at most {_MAX_PROMPT_CHARACTERS} are allowed"
        )
    if request.timeout is not None and not request.timeout > 0:
        raise ValueError(f"timeout = {request.timeout}: must be above 0 seconds")
    if request.low_res is None:
        route = _from_decoder(request, stages)
    elif request.image_embed is None:
        route = _from_picture(request, request.low_res, stages)
    else:
        raise ValueError("image_embed and low_res: give one, which says where the request begins")
    _check_beginning(request, route)
    for size, known in request.known.items():
        _check_known(size, known, route)
    return route


def _from_decoder(request: Request, stages: Stages) -> Cascade:
    """With the prior in front of it where z_i is not given."""
    embed = request.image_embed
    cascade = plan_cascade(stages.configs, request.options, with_prior=embed is None)
    decoder = stages.by_name["decoder"]
    assert isinstance(decoder, DecoderStage)
    if embed is not None:
        width = decoder.config.model.embed_dim
        if width is None:
            raise ValueError("image_embed is given, but the decoder is told none")
        if tuple(embed.shape) != (width,):
            raise ValueError(f"image_embed must be ({width},), not {tuple(embed.shape)}")
        check_unit_norm("image_embed", embed[None])
    if request.prompt is None:
        if embed is None:
            raise ValueError("prompt, image_embed, low_res: none is given; a request begins with one of them")
        if "noised_clip" in cascade.guidance.gradient_scales:
            raise ConfigError("options.decoder.clip_guidance_scale: guides towards a prompt, and there is none")
    elif cascade.classes:
        check_label("prompt", request.prompt, cascade.classes)
    elif stages.clip is None and ("prior" in cascade.sampling or decoder.config.model.text_states is not None):
        raise ConfigError("a prompt needs a CLIP; this engine has none")
    return cascade


def _from_picture(request: Request, low_res: Picture, stages: Stages) -> Cascade:
    """The upsamplers from the one that takes the picture on."""
    if low_res.dtype != np.uint8 or low_res.ndim != 3 or low_res.shape[2] != PICTURE_CHANNELS:
        raise ValueError(f"low_res must be uint8 (s, s, 3), not {low_res.dtype} {low_res.shape}")
    size, up_to = low_res.shape[0], request.options.up_to
    sampling: dict[StageName, AnySampling] = {}
    sizes: dict[StageName, int] = {}
    for name in UPSAMPLERS:
        stage = stages.by_name.get(name)
        if isinstance(stage, UpsamplerStage) and stage.config.low_res_size == size and (up_to is None or size < up_to):
            sampling[name] = getattr(request.options, name).apply(name, stage.config)
            sizes[name] = size = stage.config.image_size
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
