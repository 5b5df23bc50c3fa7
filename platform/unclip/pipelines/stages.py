"""What inference needs to know of each stage: the `config.json` of a bundle's folders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from unclip.config.base import Config, ConfigError
from unclip.diffusion.process import DiffusionConfig
from unclip.diffusion.samplers import SamplingConfig
from unclip.models.clip import ClipArchitectureConfig, ClipModel
from unclip.models.decoder import DecoderConfig, DecoderModel
from unclip.models.normalizer import EmbeddingNormalizerConfig
from unclip.models.prior import PriorConfig, PriorModel
from unclip.models.unet import UNetConfig
from unclip.models.upsampler import UpsamplerConfig, UpsamplerModel

PICTURE_CHANNELS = 3

StageName = Literal["clip", "prior", "decoder", "upsampler_256", "upsampler_1024"]
"""Folders of a bundle in the order of the cascade; a stage's `kind` is its name."""
STAGE_NAMES: tuple[StageName, ...] = get_args(StageName)


class ClipStageConfig(Config):
    """The contrastive text-image space that the other stages of the bundle were trained in."""

    kind: Literal["clip"] = "clip"
    """Names this kind of stage."""
    architecture: ClipArchitectureConfig
    """Shape of both towers."""

    def build(self) -> ClipModel:
        """The network with random weights."""
        return self.architecture.build()


class PriorStageConfig(Config):
    """Caption to CLIP image embedding by diffusion (unCLIP §2.2)."""

    kind: Literal["prior"] = "prior"
    """Names this kind of stage."""
    model: PriorConfig
    """The Transformer."""
    diffusion: DiffusionConfig
    """The noising process that it was trained to undo."""
    sampling: SamplingConfig
    """How it samples unless a request says otherwise."""
    normalizer: EmbeddingNormalizerConfig
    """Brings z_i to the unit variance that the process works on, and back."""
    num_draws: int = Field(2, ge=1, le=64)
    """Embeddings drawn for each caption, of which the one nearest z_t is kept (§2.2: two)."""

    @model_validator(mode="after")
    def _consistent(self) -> PriorStageConfig:
        if self.diffusion.variance_type == "learned_range":
            raise ValueError(
                "diffusion.variance_type = 'learned_range': the prior predicts z_i alone; "
                "use fixed_small or fixed_large"
            )
        self.sampling.timesteps(self.diffusion.num_train_timesteps)  # refuses steps that the process does not have
        _check_normalizer(self.normalizer, self.model.embed_dim)
        return self

    def build(self) -> PriorModel:
        """The network with random weights."""
        return self.model.build()


class DecoderStageConfig(Config):
    """CLIP image embedding and caption to the first, small picture (§2.1)."""

    kind: Literal["decoder"] = "decoder"
    """Names this kind of stage."""
    model: DecoderConfig
    """The U-Net and its text encoder."""
    diffusion: DiffusionConfig
    """The noising process that it was trained to undo."""
    sampling: SamplingConfig
    """How it samples unless a request says otherwise."""
    normalizer: EmbeddingNormalizerConfig
    """Applied to z_i before the network sees it."""
    image_size: int = Field(64, ge=8)
    """Side of its pictures in pixels."""

    @model_validator(mode="after")
    def _consistent(self) -> DecoderStageConfig:
        self.sampling.timesteps(self.diffusion.num_train_timesteps)  # refuses steps that the process does not have
        _check_normalizer(self.normalizer, self.model.embed_dim)
        _check_channels(self.model.unet, self.diffusion, in_channels=PICTURE_CHANNELS)
        if self.model.unet.image_size != self.image_size:
            raise ValueError(
                f"model.unet.image_size = {self.model.unet.image_size}: must be image_size = {self.image_size}, "
                "or attention would sit at other resolutions than it says"
            )
        _check_size(self.image_size, self.model.unet)
        return self

    def build(self) -> DecoderModel:
        """The network with random weights."""
        return self.model.build()


class UpsamplerStageConfig(Config):
    """A picture to the same picture several times as large, without a caption (§2.1)."""

    kind: Literal["upsampler_256", "upsampler_1024"]
    """Which of the two it is."""
    model: UpsamplerConfig
    """The convolutional U-Net."""
    diffusion: DiffusionConfig
    """The noising process that it was trained to undo."""
    sampling: SamplingConfig
    """How it samples unless a request says otherwise."""
    low_res_size: int = Field(ge=8)
    """Side of the pictures it takes in pixels: what the stage before makes."""
    image_size: int = Field(ge=16)
    """Side of its pictures in pixels."""

    @model_validator(mode="after")
    def _consistent(self) -> UpsamplerStageConfig:
        self.sampling.timesteps(self.diffusion.num_train_timesteps)  # refuses steps that the process does not have
        if self.sampling.guidance_scale != 1.0:
            raise ValueError(
                f"sampling.guidance_scale = {self.sampling.guidance_scale}: "
                "an upsampler has no caption to guide it; only 1.0 is allowed"
            )
        _check_channels(self.model.unet, self.diffusion, in_channels=2 * PICTURE_CHANNELS)
        _check_size(self.image_size, self.model.unet)
        if self.image_size % self.low_res_size or self.image_size == self.low_res_size:
            raise ValueError(
                f"image_size = {self.image_size}: must be a multiple of low_res_size = {self.low_res_size}, and larger"
            )
        return self

    def build(self) -> UpsamplerModel:
        """The network with random weights."""
        return self.model.build()


StageConfig = ClipStageConfig | PriorStageConfig | DecoderStageConfig | UpsamplerStageConfig
_CLASSES: dict[StageName, type[StageConfig]] = {
    "clip": ClipStageConfig,
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
    return _CLASSES[kind].from_dict(data)


def _check_normalizer(normalizer: EmbeddingNormalizerConfig, embed_dim: int) -> None:
    for name in ("mean", "std"):
        value = getattr(normalizer, name)
        if isinstance(value, tuple) and len(value) != embed_dim:
            raise ValueError(f"normalizer.{name}: has {len(value)} numbers for model.embed_dim = {embed_dim}")


def _check_channels(unet: UNetConfig, diffusion: DiffusionConfig, *, in_channels: int) -> None:
    learned = diffusion.variance_type == "learned_range"
    out_channels = PICTURE_CHANNELS * (2 if learned else 1)
    if unet.in_channels != in_channels:
        raise ValueError(f"model.unet.in_channels = {unet.in_channels}: must be {in_channels} in this stage")
    if unet.out_channels != out_channels:
        raise ValueError(
            f"model.unet.out_channels = {unet.out_channels}: must be {out_channels} with "
            f"diffusion.variance_type = {diffusion.variance_type!r}"
        )


def _check_size(size: int, unet: UNetConfig) -> None:
    if size % unet.stride:
        raise ValueError(f"image_size = {size}: must be a multiple of {unet.stride}, the stride of model.unet")
