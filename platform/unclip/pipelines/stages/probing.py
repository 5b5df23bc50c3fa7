"""What a stage's network computes of inputs that never change: a few numbers, by which it is known again elsewhere.

The inputs are random, from streams of their own, so that every weight counts; networks that may be told nothing have a
second row that is. Pictures are as small as a U-Net takes them without its deepest maps being single pixels, which attention
and normalisations would see nothing in: that makes a probe of the largest stages cost little more than reading their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from unclip.models.ar_prior import ARPriorModel
from unclip.models.classifier import ClassifierModel
from unclip.models.clip import ClipModel
from unclip.models.noised_clip import NoisedClipModel
from unclip.models.prior import PriorCondition
from unclip.models.unet import UNetConfig
from unclip.models.upsampler import UpsamplerCondition
from unclip.pipelines.pictures import PICTURE_CHANNELS
from unclip.pipelines.stages import (
    ARPriorStageConfig,
    ClassifierStageConfig,
    ClipStageConfig,
    DecoderStageConfig,
    NoisedClipStageConfig,
    PriorStageConfig,
    StageConfig,
    UpsamplerStageConfig,
)
from unclip.pipelines.stages.decoder import decoder_condition
from unclip.utils.random import SampleGenerator

Outputs = Mapping[str, torch.Tensor]

_VALUES = 48
"""Of each output."""
_CLIP_VOCABULARY = 49408


class _Inputs:
    """Random inputs of `rows` samples, by name; drawn on the CPU, which draws the same everywhere."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows, self.device = rows, device
        self._streams = SampleGenerator.for_samples(0, torch.arange(rows)).child("probe")

    def normal(self, name: str, *shape: int) -> torch.Tensor:
        """(rows, *shape) standard normal."""
        return self._streams.child(name).normal(shape).to(self.device)

    def unit(self, name: str, width: int) -> torch.Tensor:
        """(rows, width) of unit norm."""
        return functional.normalize(self.normal(name, width), dim=1)

    def integers(self, name: str, length: int, high: int) -> torch.Tensor:
        """(rows, length) int64 in [0, high)."""
        return (self._streams.child(name).uniform((length,)) * high).long().clamp(max=high - 1).to(self.device)

    def tokens(self, length: int, vocabulary: int) -> torch.Tensor:
        """(rows, length) int64: a caption that ends with the highest token, by which its end is known, and padding."""
        padding = length // 4
        tokens = functional.pad(self.integers("tokens", length - padding, vocabulary - 1), (0, padding))
        tokens[:, length - padding - 1] = vocabulary - 1
        return tokens

    def timesteps(self, total: int) -> torch.Tensor:
        """(rows,) int64: in the middle."""
        return torch.full((self.rows,), total // 2, device=self.device)

    @property
    def last(self) -> torch.Tensor:
        """(rows,) bool: the row that is told nothing."""
        return torch.arange(self.rows, device=self.device) == self.rows - 1


@torch.no_grad()
def probe_outputs(config: StageConfig, model: nn.Module, device: torch.device) -> dict[str, tuple[float, ...]]:
    """By name, at most 48 values of each output of a stage's network, which is on `device`, evenly picked."""
    outputs = _PROBES[type(config)](config, model, device)
    return {name: _picked(output) for name, output in outputs.items()}


def _picked(output: torch.Tensor) -> tuple[float, ...]:
    values = output.float().flatten().cpu()
    places = torch.linspace(0, len(values) - 1, min(_VALUES, len(values)), dtype=torch.float64).round().long()
    return tuple(values[places].tolist())


def _clip(config: ClipStageConfig, model: ClipModel, device: torch.device) -> Outputs:
    side, inputs = config.architecture.image_size, _Inputs(1, device)
    pixels = inputs.integers("picture", side * side * PICTURE_CHANNELS, 256).to(torch.uint8)
    tokens = inputs.tokens(config.architecture.context_length, _CLIP_VOCABULARY)
    picture = pixels.view(1, side, side, PICTURE_CHANNELS)
    return {"picture": model.encode_image(picture), "text": model.encode_text(tokens)}


def _noised_clip(config: NoisedClipStageConfig, model: NoisedClipModel, device: torch.device) -> Outputs:
    side, text, inputs = config.image_size, config.model.text, _Inputs(1, device)
    x_t = inputs.normal("x_t", PICTURE_CHANNELS, side, side)
    timesteps = inputs.timesteps(config.diffusion.num_train_timesteps)
    return {
        "picture": model.encode_image(x_t, timesteps),
        "text": model.encode_text(inputs.tokens(text.context_length, text.vocab_size)),
        "scale": model.logit_scale,
    }


def _classifier(config: ClassifierStageConfig, model: ClassifierModel, device: torch.device) -> Outputs:
    side, inputs = config.image_size, _Inputs(1, device)
    x_t = inputs.normal("x_t", PICTURE_CHANNELS, side, side)
    return {"logits": model(x_t, inputs.timesteps(config.diffusion.num_train_timesteps))}


def _caption(config: PriorStageConfig | ARPriorStageConfig, inputs: _Inputs) -> PriorCondition:
    model = config.model
    tokens = inputs.tokens(model.context_length, model.vocab_size)
    return PriorCondition.of_captions(inputs.unit("text_embed", model.embed_dim), tokens, inputs.last)


def _prior(config: PriorStageConfig, model: Any, device: torch.device) -> Outputs:
    inputs = _Inputs(2, device)
    x_t = inputs.normal("x_t", config.model.embed_dim)
    timesteps = inputs.timesteps(config.diffusion.num_train_timesteps)
    return {"image_embed": model(x_t, timesteps, model.prepare(_caption(config, inputs)))}


def _ar_prior(config: ARPriorStageConfig, model: ARPriorModel, device: torch.device) -> Outputs:
    inputs, shape = _Inputs(2, device), config.model
    codes = inputs.integers("codes", shape.num_components, shape.num_buckets)
    dots = inputs.integers("dots", 1, shape.num_buckets)[:, 0]
    dot_logits, code_logits = model(dots, codes, _caption(config, inputs))
    return {"dot": dot_logits, "codes": code_logits, "image_embed": model.codec.decode(codes)}


def _side(unet: UNetConfig) -> int:
    return min(2 * unet.stride, unet.image_size)


def _decoder(config: DecoderStageConfig, model: Any, device: torch.device) -> Outputs:
    shape, inputs = config.model, _Inputs(2, device)
    side, told = _side(shape.unet), dict[str, torch.Tensor]()
    if shape.embed_dim is not None:
        told["image_embed"] = inputs.normal("image_embed", shape.embed_dim)
    if shape.context_length is not None:
        vocabulary = shape.vocab_size or _CLIP_VOCABULARY
        told["tokens"] = inputs.tokens(shape.context_length, vocabulary)
    if shape.text_states is not None:
        told["text_states"] = inputs.normal("states", shape.text_states.context_length, shape.text_states.state_dim)
    if shape.num_classes is not None:
        told["label"] = inputs.integers("label", 1, shape.num_classes)[:, 0]
    if shape.inpainting:
        told["known"] = inputs.normal("known", PICTURE_CHANNELS, side, side)
        told["known_mask"] = (inputs.normal("mask", 1, side, side) > 0).float()
    cond = decoder_condition(shape, told, dict.fromkeys(("image", "text", "label"), inputs.last))
    x_t = inputs.normal("x_t", PICTURE_CHANNELS, side, side)
    timesteps = inputs.timesteps(config.diffusion.num_train_timesteps)
    return _prediction(model(x_t, timesteps, model.prepare(cond)))


def _upsampler(config: UpsamplerStageConfig, model: Any, device: torch.device) -> Outputs:
    inputs, side = _Inputs(1, device), _side(config.model.unet)
    x_t, low_res = (inputs.normal(name, PICTURE_CHANNELS, side, side) for name in ("x_t", "low_res"))
    timesteps = inputs.timesteps(config.diffusion.num_train_timesteps)
    level = timesteps // 2 if config.model.noise_conditioning else None
    return _prediction(model(x_t, timesteps, model.prepare(UpsamplerCondition(low_res, level))))


def _prediction(output: torch.Tensor) -> Outputs:
    """The prediction, and the variance where it is learned: the two differ in scale."""
    names = ("prediction", "variance")
    return dict(zip(names, output.split(PICTURE_CHANNELS, dim=1), strict=False))


_PROBES: Mapping[type[StageConfig], Callable[[Any, Any, torch.device], Outputs]] = {
    ClipStageConfig: _clip,
    NoisedClipStageConfig: _noised_clip,
    ClassifierStageConfig: _classifier,
    PriorStageConfig: _prior,
    ARPriorStageConfig: _ar_prior,
    DecoderStageConfig: _decoder,
    UpsamplerStageConfig: _upsampler,
}
