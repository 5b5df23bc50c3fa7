"""The stages of the cascade: what a bundle's `STAGE/config.json` holds of each, and how it samples.

Every `sample` draws from one stream a picture, so what comes out for a picture does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from unclip.config.base import ConfigError
from unclip.pipelines.stages.ar_prior import ARPriorStage, ARPriorStageConfig, ARSamplingConfig
from unclip.pipelines.stages.classifier import ClassifierStageConfig
from unclip.pipelines.stages.clip import ClipStageConfig
from unclip.pipelines.stages.decoder import DecoderStage, DecoderStageConfig
from unclip.pipelines.stages.noised_clip import NoisedClipStageConfig
from unclip.pipelines.stages.prior import PriorStage, PriorStageConfig
from unclip.pipelines.stages.upsampler import UpsamplerStage, UpsamplerStageConfig

__all__ = [
    "STAGE_NAMES",
    "ARPriorStage",
    "ARPriorStageConfig",
    "ARSamplingConfig",
    "AnyPriorStage",
    "AnyPriorStageConfig",
    "ClassifierStageConfig",
    "ClipStageConfig",
    "DecoderStage",
    "DecoderStageConfig",
    "NoisedClipStageConfig",
    "PriorStage",
    "PriorStageConfig",
    "StageConfig",
    "StageName",
    "UpsamplerStage",
    "UpsamplerStageConfig",
    "stage_config_from_dict",
]

StageName = Literal["clip", "noised_clip", "classifier", "prior", "decoder", "upsampler_256", "upsampler_1024"]
"""Folders of a bundle in the order of the cascade; a stage's `kind` is its name."""
STAGE_NAMES: tuple[StageName, ...] = get_args(StageName)

AnyPriorStageConfig = PriorStageConfig | ARPriorStageConfig
"""The `prior` stage of a bundle is of either kind; `prior_type` says of which."""
AnyPriorStage = PriorStage | ARPriorStage

StageConfig = (
    ClipStageConfig
    | NoisedClipStageConfig
    | ClassifierStageConfig
    | PriorStageConfig
    | ARPriorStageConfig
    | DecoderStageConfig
    | UpsamplerStageConfig
)
_CLASSES: dict[StageName, type[StageConfig]] = {
    "clip": ClipStageConfig,
    "noised_clip": NoisedClipStageConfig,
    "classifier": ClassifierStageConfig,
    "prior": PriorStageConfig,
    "decoder": DecoderStageConfig,
    "upsampler_256": UpsamplerStageConfig,
    "upsampler_1024": UpsamplerStageConfig,
}


def stage_config_from_dict(data: Mapping[str, Any]) -> StageConfig:
    """The configuration of the kind that `data` names; `ConfigError` says what is unknown, missing or out of range."""
    kind = data.get("kind")
    if kind not in _CLASSES:
        raise ConfigError(f"kind = {kind!r}: must be one of {', '.join(STAGE_NAMES)}")
    if kind == "prior" and data.get("prior_type") == "autoregressive":
        return ARPriorStageConfig.from_dict(data)
    return _CLASSES[kind].from_dict(data)
