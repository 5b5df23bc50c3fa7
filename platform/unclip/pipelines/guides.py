"""Guides of the decoder: networks that say how well a noised picture fits a caption or a class.

Each gives a log probability whose gradient in x_t steers the samples (Dhariwal and Nichol 2021, section 4; Nichol et al.
2021, GLIDE, section 2.4). Shapes: B pictures, D the width of the noised CLIP's joint space.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional

from unclip.config.base import Config, ConfigError
from unclip.diffusion.guidance import Guide, LogProbability, gradient_guided
from unclip.diffusion.process import DiffusionProcess
from unclip.models.classifier import ClassifierModel
from unclip.models.clip import Tokenizer
from unclip.models.noised_clip import NoisedClipModel
from unclip.pipelines.bundle import BundleError
from unclip.pipelines.stages import (
    ClassifierStageConfig,
    DecoderStageConfig,
    NoisedClipStageConfig,
    StageConfig,
    StageName,
)
from unclip.pipelines.stages.checks import device_of

GuideName = Literal["noised_clip", "classifier"]


_MAX_SCALE = 1e6
"""Far beyond any use; without a bound, float32 overflows and there is no picture."""


class GuideOptions(Config):
    """Which guides steer the decoder, and how strongly; none unless asked for."""

    clip_guidance_scale: float = Field(0.0, ge=0, le=_MAX_SCALE)
    """Scale of the gradient of the bundle's noised CLIP towards the prompt; 0 is off."""
    classifier_guidance_scale: float = Field(0.0, ge=0, le=_MAX_SCALE)
    """Scale of the gradient of the bundle's classifier towards class_label; 0 is off."""
    class_label: str | None = None
    """One of the classifier's classes, for all pictures; goes with classifier_guidance_scale."""

    @model_validator(mode="after")
    def _consistent(self) -> GuideOptions:
        if (self.class_label is None) != (self.classifier_guidance_scale == 0):
            raise ValueError(
                f"class_label = {self.class_label!r} and classifier_guidance_scale = {self.classifier_guidance_scale}: "
                "give both or neither"
            )
        return self

    @property
    def gradient_scales(self) -> Mapping[GuideName, float]:
        """The scale of each guide that is on."""
        scales: dict[GuideName, float] = {
            "noised_clip": self.clip_guidance_scale,
            "classifier": self.classifier_guidance_scale,
        }
        return {name: scale for name, scale in scales.items() if scale > 0}


class DecoderGuide(ABC):
    """A network that knows what its pictures should become."""

    config: NoisedClipStageConfig | ClassifierStageConfig
    network: nn.Module

    @abstractmethod
    def target(self, prompts: Sequence[str], options: GuideOptions) -> torch.Tensor:
        """What the pictures of B prompts should become: (B, ...), computed once for all steps."""

    @abstractmethod
    def log_probability(self, target: torch.Tensor) -> LogProbability[Any]:
        """How probable `target` (B, ...) is, up to a constant, given noised pictures (B, 3, S, S) in the same order."""


class ClipGuide(DecoderGuide):
    """CLIP guidance: exp(logit scale) * f(x_t, t) . g(c) stands for log p(c | x_t) (GLIDE, section 2.4)."""

    config: NoisedClipStageConfig
    network: NoisedClipModel

    def __init__(self, config: NoisedClipStageConfig, model: nn.Module) -> None:
        assert isinstance(model, NoisedClipModel)
        self.config = config
        self.network = model

    def target(self, prompts: Sequence[str], options: GuideOptions) -> torch.Tensor:
        """g(c) (B, D) of the prompts, unit norm."""
        tokens = Tokenizer(None)(prompts, self.config.model.text.context_length)
        return self.network.encode_text(torch.from_numpy(tokens).to(device_of(self.network)))

    def log_probability(self, target: torch.Tensor) -> LogProbability[Any]:
        def scaled_cosine(x_t: torch.Tensor, timesteps: torch.Tensor, _: Any) -> torch.Tensor:
            return self.network.logit_scale * (self.network.encode_image(x_t, timesteps) * target).sum(dim=1)

        return scaled_cosine


class ClassifierGuide(DecoderGuide):
    """Classifier guidance: log p(y | x_t, t) (Dhariwal and Nichol 2021, section 4.1)."""

    config: ClassifierStageConfig
    network: ClassifierModel

    def __init__(self, config: ClassifierStageConfig, model: nn.Module) -> None:
        assert isinstance(model, ClassifierModel)
        self.config = config
        self.network = model

    def target(self, prompts: Sequence[str], options: GuideOptions) -> torch.Tensor:
        """The position of `options.class_label` among the classes: (B,) int64."""
        assert options.class_label is not None
        label = self.config.classes.index(options.class_label)
        return torch.full((len(prompts),), label, device=device_of(self.network))

    def log_probability(self, target: torch.Tensor) -> LogProbability[Any]:
        def log_softmax(x_t: torch.Tensor, timesteps: torch.Tensor, _: Any) -> torch.Tensor:
            return -functional.cross_entropy(self.network(x_t, timesteps), target, reduction="none")

        return log_softmax


def build_guide(config: StageConfig, model: nn.Module) -> DecoderGuide:
    """The guide of a `noised_clip` or `classifier` stage."""
    if isinstance(config, NoisedClipStageConfig):
        return ClipGuide(config, model)
    assert isinstance(config, ClassifierStageConfig)
    return ClassifierGuide(config, model)


def combined_guide(terms: Sequence[tuple[float, LogProbability[Any]]], process: DiffusionProcess) -> Guide:
    """The guide that shifts scores by the gradient of the sum of scale * log probability over `terms`."""

    def total(x_t: torch.Tensor, timesteps: torch.Tensor, cond: Any) -> torch.Tensor:
        return torch.stack([scale * log_probability(x_t, timesteps, cond) for scale, log_probability in terms]).sum(0)

    return lambda denoise: gradient_guided(denoise, total, 1.0, process)


def check_guides(configs: Mapping[StageName, StageConfig], decoder: DecoderStageConfig, options: GuideOptions) -> None:
    """Whether `configs` have every guide that `options` turn on, made for the pictures of `decoder`.

    Raises `BundleError` where a stage is missing, or was trained on pictures of another size or on other noise, and
    `ConfigError` where the classifier does not know the class.
    """
    for name, scale in options.gradient_scales.items():
        guide = configs.get(name)
        if not isinstance(guide, NoisedClipStageConfig | ClassifierStageConfig):
            field = "clip_guidance_scale" if name == "noised_clip" else "classifier_guidance_scale"
            raise BundleError(
                f"options.decoder.{field} = {scale}: needs the stage {name}; the bundle has {', '.join(configs)}"
            )
        _check_pictures(name, guide, decoder)
        if isinstance(guide, ClassifierStageConfig):
            check_label("options.decoder.class_label", options.class_label or "", guide.classes)


def _check_pictures(
    name: GuideName, guide: NoisedClipStageConfig | ClassifierStageConfig, decoder: DecoderStageConfig
) -> None:
    if guide.image_size != decoder.image_size:
        raise BundleError(
            f"stage {name!r} knows pictures of {guide.image_size} pixels, but the decoder makes {decoder.image_size}"
        )
    ours, theirs = guide.diffusion, decoder.diffusion
    steps = ours.num_train_timesteps, theirs.num_train_timesteps
    timesteps = torch.arange(min(steps))
    noise = [config.build().alphas_cumprod(timesteps) for config in (ours, theirs)]
    if steps[0] != steps[1] or not torch.equal(*noise):
        fields = ("beta_schedule", "num_train_timesteps", "zero_terminal_snr")
        known, made = ({field: getattr(config, field) for field in fields} for config in (ours, theirs))
        raise BundleError(f"stage {name!r} was trained on the noise of {known}, but the decoder's is that of {made}")


def check_label(field: str, label: str, classes: Sequence[str]) -> None:
    """Raises `ConfigError` naming `field` and what was perhaps meant where `label` is none of `classes`."""
    if label in classes:
        return
    close = difflib.get_close_matches(label, classes, n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"they are {', '.join(classes[:20])}"
    more = f" and {len(classes) - 20} more" if not close and len(classes) > 20 else ""
    raise ConfigError(f"{field} = {label!r}: none of the {len(classes)} classes; {hint}{more}")
