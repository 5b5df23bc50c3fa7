"""The `decoder` stage: CLIP image embedding and caption to the first, small picture (unCLIP §2.1).

By what its model is told it is also GLIDE's (caption alone) or ADM's (class).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from unclip.config.base import Config
from unclip.diffusion.guidance import Guide
from unclip.diffusion.process import DiffusionConfig
from unclip.diffusion.samplers import Progress, SamplingConfig
from unclip.models.conditioners import CaptionCondition, ImageCondition, LabelCondition, TextStatesCondition
from unclip.models.decoder import DecoderCondition, DecoderConfig, DecoderModel
from unclip.models.normalizer import EmbeddingNormalizerConfig
from unclip.models.text import caption_mask
from unclip.pipelines.pictures import PICTURE_CHANNELS, picture_noise
from unclip.pipelines.stages.checks import (
    channels_last,
    check_channels,
    check_normalizer,
    check_signed,
    check_size,
    check_unit_norm,
    device_of,
)
from unclip.pipelines.stages.diffusion_stage import DiffusionStage, Start
from unclip.utils.random import SampleGenerator

ConditionPart = Literal["image", "text", "label"]
"""What a decoder may not see."""

_KNOWN_CHANNELS = PICTURE_CHANNELS + 1


class DecoderStageConfig(Config):
    """CLIP image embedding and caption to the first, small picture (§2.1)."""

    kind: Literal["decoder"] = "decoder"
    """Names this kind of stage."""
    model: DecoderConfig
    """The U-Net and what it is told."""
    diffusion: DiffusionConfig
    """The noising process that it was trained to undo."""
    sampling: SamplingConfig
    """How it samples unless a request says otherwise."""
    normalizer: EmbeddingNormalizerConfig = EmbeddingNormalizerConfig()
    """Applied to z_i before the network sees it."""
    unit_norm: bool = True
    """Whether z_i has unit norm; false: it is as CLIP's projection gives it, whose norm then counts (Karlo)."""
    label_column: str | None = Field(default=None, min_length=1)
    """Column of the records that holds the class, for a model with classes; values are compared as text."""
    classes: tuple[str, ...] = ()
    """The values of that column in the order of the model's classes."""
    image_size: int = Field(64, ge=8)
    """Side of its pictures in pixels."""

    @model_validator(mode="after")
    def _consistent(self) -> DecoderStageConfig:
        self.sampling.timesteps(self.diffusion.num_train_timesteps)  # refuses steps that the process does not have
        if self.model.embed_dim is not None:
            check_normalizer(self.normalizer, self.model.embed_dim)
        known = _KNOWN_CHANNELS if self.model.inpainting else 0
        check_channels(self.model.unet, self.diffusion, in_channels=PICTURE_CHANNELS + known)
        if self.model.unet.image_size != self.image_size:
            raise ValueError(
                f"model.unet.image_size = {self.model.unet.image_size}: must be image_size = {self.image_size}, "
                "or attention would sit at other resolutions than it says"
            )
        check_size(self.image_size, self.model.unet)
        if len(self.classes) != (self.model.num_classes or 0):
            raise ValueError(f"classes: has {len(self.classes)} names for model.num_classes = {self.model.num_classes}")
        if (self.label_column is None) != (self.model.num_classes is None):
            raise ValueError(
                f"label_column = {self.label_column}: goes with model.num_classes = {self.model.num_classes}"
            )
        return self

    @property
    def in_clip_space(self) -> bool:
        """Whether its network sees what a CLIP makes, and so fits only bundles of that CLIP."""
        return bool({"image_embed", "text_states"} & set(self.model.inputs))

    def build(self) -> DecoderModel:
        """The network with random weights."""
        return self.model.build()


def decoder_condition(
    config: DecoderConfig, inputs: Mapping[str, torch.Tensor], dropped: Mapping[str, torch.Tensor]
) -> DecoderCondition:
    """The condition of a decoder: the one way it is made, in training and in sampling.

    Args:
        inputs: all of `config.inputs`: `image_embed` (B, D), normalised; `tokens` (B, L) of CLIP's byte-pair encoding;
            `text_states` (B, L, S) of those tokens; `label` (B,) int64; `known` (B, 3, S, S) in [-1, 1] and `known_mask`
            (B, 1, S, S) float, 1 = known. What else is there is not looked at.
        dropped: (B,) bool for `image`, `text` and `label`, True = this sample does not see it; all see what is left out.

    Raises `ValueError` naming an input that is missing.
    """
    missing = [name for name in config.inputs if name not in inputs]
    if missing:
        raise ValueError(f"{missing[0]} is missing: this decoder is told {', '.join(config.inputs)}")
    told = {name: inputs[name] for name in config.inputs}
    first = next(iter(told.values()))
    kept = torch.zeros(len(first), dtype=torch.bool, device=first.device)
    drop = {"image": kept, "text": kept, "label": kept} | dict(dropped)
    image = label = None
    text: CaptionCondition | TextStatesCondition | None = None
    if "image_embed" in told:
        image = ImageCondition(dropped=drop["image"], embed=told["image_embed"])
    if "text_states" in told:
        mask = caption_mask(told["tokens"])
        text = TextStatesCondition(dropped=drop["text"], mask=mask, states=told["text_states"])
    elif "tokens" in told:
        text = CaptionCondition(dropped=drop["text"], mask=caption_mask(told["tokens"]), tokens=told["tokens"])
    if "label" in told:
        label = LabelCondition(dropped=drop["label"], label=told["label"])
    return DecoderCondition(
        image=image, text=text, label=label, known=told.get("known"), known_mask=told.get("known_mask")
    )


class DecoderStage(DiffusionStage):
    """CLIP image embedding and caption to the first picture (§2.1); arguments as for `DiffusionStage`."""

    def __init__(self, config: DecoderStageConfig, model: nn.Module) -> None:
        super().__init__(config, channels_last(model))
        self.config = config
        self._normalizer = config.normalizer.build().to(device_of(model))

    def begin(
        self,
        image_embed: torch.Tensor | None,
        tokens: torch.Tensor | None,
        generator: SampleGenerator,
        *,
        further: Mapping[str, torch.Tensor] = MappingProxyType({}),
        dropped: Collection[ConditionPart] = (),
        negative: Mapping[str, torch.Tensor] | None = None,
    ) -> Start:
        """Arguments as for `sample`; of the parts in `dropped` the network sees nothing, and they need no input.

        `negative` are the inputs of captions, `tokens` and `text_states`, that guidance leads away from; z_i is dropped there,
        as training drops it beside captions (§2.1).
        """
        inputs = self._placeholders(dropped, generator.keys) | dict(further)
        if image_embed is not None:
            if self.config.unit_norm:
                check_unit_norm("image_embed", image_embed)
            inputs["image_embed"] = self._normalizer.normalize(image_embed)
        if tokens is not None:
            inputs["tokens"] = tokens
        x_T = picture_noise(generator, self.config.image_size)
        if self.config.model.inpainting and "known" not in inputs:
            inputs |= {"known": torch.zeros_like(x_T), "known_mask": torch.zeros_like(x_T[:, :1])}
        if "known" in inputs:
            check_signed("known", inputs["known"])
        self._check_labels(inputs)
        unseen = torch.ones_like(generator.keys, dtype=torch.bool)
        cond = decoder_condition(self.config.model, inputs, dict.fromkeys(dropped, unseen))
        if negative is None:
            return Start(x_T, cond)
        others = {"image": unseen, "label": unseen}
        return Start(x_T, cond, decoder_condition(self.config.model, {**inputs, **negative}, others))

    def finish(self, x_start: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) in [-1, 1]."""
        return x_start.clamp(-1, 1)

    def sample(
        self,
        image_embed: torch.Tensor | None,
        tokens: torch.Tensor | None,
        generator: SampleGenerator,
        *,
        sampling: SamplingConfig,
        further: Mapping[str, torch.Tensor] = MappingProxyType({}),
        x_T: torch.Tensor | None = None,
        guide: Guide | None = None,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """(B, 3, S, S) in [-1, 1], S = `config.image_size`.

        Args:
            image_embed: (B, D) z_i, of unit norm with `config.unit_norm`; None where the decoder is not told.
            tokens: (B, L) int64 in the context length of this stage; None where the decoder is not told.
            generator: a stream for each of the B pictures.
            further: what else the decoder is told, see `decoder_condition`. Without `known` nothing is known.
            x_T: (B, 3, S, S) to begin from; None: drawn from `generator`.
            guide: further guidance, around the classifier-free one.

        Raises `ValueError` where embeddings, pictures or classes are outside their range.
        """
        start = self.begin(image_embed, tokens, generator, further=further).at(x_T)
        return self.run(start, generator, sampling=sampling, guide=guide, progress=progress)

    def _placeholders(self, dropped: Collection[ConditionPart], rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Inputs that stand for the `dropped` parts; the network does not look at them."""
        model, found = self.config.model, dict[str, torch.Tensor]()
        if "image" in dropped and model.embed_dim is not None:
            found["image_embed"] = torch.zeros(len(rows), model.embed_dim, device=rows.device)
        if "text" in dropped and model.context_length is not None:
            found["tokens"] = rows.new_zeros(len(rows), model.context_length)
        if "text" in dropped and model.text_states is not None:
            shape = (len(rows), model.text_states.context_length, model.text_states.state_dim)
            found["text_states"] = torch.zeros(shape, device=rows.device)
        if "label" in dropped and model.num_classes is not None:
            found["label"] = torch.zeros_like(rows)
        return found

    def _check_labels(self, inputs: Mapping[str, torch.Tensor]) -> None:
        label, count = inputs.get("label"), self.config.model.num_classes
        if label is not None and count is not None and not bool(((label >= 0) & (label < count)).all()):
            raise ValueError(f"label = {label.tolist()}: each must be from 0 to {count - 1}")
