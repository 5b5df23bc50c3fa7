"""The decoder: CLIP image embedding, caption or class -> picture of 64 pixels.

Which of them a decoder is told makes it unCLIP's (section 2.1: image embedding and caption), GLIDE's (section 4.1:
caption alone) or ADM's class-conditional one (section 4).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import nn

from unclip.config.base import Config
from unclip.models.condition import Condition, PreparedCondition
from unclip.models.conditioners import (
    CaptionCondition,
    CaptionConditioner,
    ClipCaptionConditioner,
    ClipCaptionConfig,
    ImageCondition,
    ImageConditioner,
    LabelCondition,
    LabelConditioner,
    TextStatesCondition,
    TextStatesConditioner,
    TextStatesConfig,
    Told,
)
from unclip.models.text import TextTransformerConfig
from unclip.models.unet import UNetCondition, UNetConfig


class DecoderConfig(Config):
    """Shape of a decoder; the inputs that are null it does not have."""

    unet: UNetConfig
    """the picture's network"""
    text: TextTransformerConfig | None = None
    """the caption's network, trained together with it"""
    text_states: TextStatesConfig | None = None
    """captions as the text states of a frozen CLIP, in place of a network of their own"""
    clip_text: ClipCaptionConfig | None = None
    """captions through a frozen CLIP text transformer inside the decoder (Karlo)"""
    embed_dim: int | None = Field(default=None, ge=1)
    """width D of the CLIP image embedding"""
    num_image_tokens: int = Field(default=4, ge=1)
    """tokens made of the image embedding for the attention's context"""
    num_classes: int | None = Field(default=None, ge=1)
    """number of classes; 1 makes an unconditional decoder"""
    inpainting: bool = False
    """True: the decoder also sees the known part of the picture, as 4 further input channels (GLIDE, section 4.3)"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(part is not None for part in (self.text, self.text_states, self.clip_text)) > 1:
            raise ValueError("text, text_states and clip_text exclude each other: set all but one of them to null")
        if self.context_dim is None and self.num_classes is None:
            raise ValueError(
                "a decoder needs at least one input: text, text_states, clip_text, embed_dim or num_classes"
            )
        if self.context_dim is not None and not self.unet.attention_resolutions:
            raise ValueError(
                "unet.attention_resolutions = (): the decoder sees caption and image embedding through attention"
            )
        return self

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of what a sample must come with."""
        wanted = {
            "image_embed": self.embed_dim is not None,
            "tokens": self.context_length is not None,
            "text_states": self.text_states is not None,
            "label": self.num_classes is not None,
            "known": self.inpainting,
            "known_mask": self.inpainting,
        }
        return tuple(name for name, needed in wanted.items() if needed)

    @property
    def context_length(self) -> int | None:
        """Tokens of a caption; None where it sees none."""
        if self.clip_text is not None:
            return self.clip_text.encoder.context_length
        text = self.text or self.text_states
        return None if text is None else text.context_length

    @property
    def vocab_size(self) -> int | None:
        """Number of tokens of the captions' encoding where the decoder itself reads them; None where it does not."""
        text = self.text or (None if self.clip_text is None else self.clip_text.encoder)
        return None if text is None else text.vocab_size

    @property
    def context_dim(self) -> int | None:
        """Width of the context of the U-Net's attention; None without a context."""
        text = self.text or self.text_states or self.clip_text
        if text is not None:
            return text.width
        return None if self.embed_dim is None else self.unet.embedding_dim

    def build(self) -> DecoderModel:
        """The model with random weights."""
        return DecoderModel(self)


@dataclass(frozen=True)
class DecoderCondition(Condition):
    """What a decoder is told: exactly the parts that its configuration names.

    known: (B, 3, H, W) in [-1, 1] and known_mask: (B, 1, H, W) float, 1 = this pixel is known, for inpainting. They are
    no condition to be guided by: `unconditional` leaves them as they are, as GLIDE does.
    """

    image: ImageCondition | None = None
    text: CaptionCondition | TextStatesCondition | None = None
    label: LabelCondition | None = None
    known: torch.Tensor | None = None
    known_mask: torch.Tensor | None = None

    def parts(self) -> dict[str, ImageCondition | CaptionCondition | TextStatesCondition | LabelCondition]:
        """The parts that guidance drops, by name."""
        parts = {"image": self.image, "text": self.text, "label": self.label}
        return {name: part for name, part in parts.items() if part is not None}

    def unconditional(self) -> DecoderCondition:
        changes = {name: part.unconditional() for name, part in self.parts().items()}
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]  # each in the place that it came from


@dataclass(frozen=True)
class PreparedDecoderCondition(PreparedCondition):
    """A `DecoderCondition` after `DecoderModel.prepare`; known: (B, 4, H, W), known pixels and their mask."""

    unet: UNetCondition
    known: torch.Tensor | None


class DecoderModel(nn.Module):
    """A U-Net that is told, by one conditioner for each input, what to draw.

    Their embeddings are added to the time embedding, their tokens are the context of every attention: those of the
    image embedding first, then the caption's.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.unet = config.unet.build(context_dim=config.context_dim)
        self.conditioners = nn.ModuleDict(_conditioners(config))

    def prepare(self, cond: DecoderCondition) -> PreparedDecoderCondition:
        """All of `cond` that does not change between steps: text states, keys and values, embedding.

        Raises `ValueError` where `cond` does not have exactly the parts of the configuration.
        """
        self._check(cond)
        parts = cond.parts()
        told: list[Told] = [conditioner(parts[name]) for name, conditioner in self.conditioners.items()]
        context, mask = _join(told)
        unet = self.unet.prepare(torch.stack([part.embedding for part in told]).sum(dim=0), context, mask)
        if cond.known is None or cond.known_mask is None:
            return PreparedDecoderCondition(unet, None)
        return PreparedDecoderCondition(unet, torch.cat([cond.known * cond.known_mask, cond.known_mask], dim=1))

    def forward(
        self, x_t: torch.Tensor, timesteps: torch.Tensor, cond: DecoderCondition | PreparedDecoderCondition
    ) -> torch.Tensor:
        """The model output (B, unet.out_channels, H, W), float32.

        Args:
            x_t: (B, 3, H, W), the noised picture.
            timesteps: (B,), 0 = least noise.
            cond: see `DecoderCondition`; prepared or not, the output is the same.
        """
        prepared = self.prepare(cond) if isinstance(cond, DecoderCondition) else cond
        x = x_t if prepared.known is None else torch.cat([x_t, prepared.known.to(x_t.dtype)], dim=1)
        result: torch.Tensor = self.unet(x, timesteps, prepared.unet)
        return result

    def _check(self, cond: DecoderCondition) -> None:
        missing = self.conditioners.keys() ^ cond.parts().keys()
        if missing:
            raise ValueError(
                f"the condition has {', '.join(cond.parts()) or 'nothing'}; this decoder wants exactly "
                f"{', '.join(self.conditioners)}"
            )
        for name, part in (("known", cond.known), ("known_mask", cond.known_mask)):
            if (part is not None) != self.config.inpainting:
                raise ValueError(
                    f"{name} is {'missing' if part is None else 'given'}, but inpainting = {self.config.inpainting}"
                )


def _conditioners(config: DecoderConfig) -> dict[str, nn.Module]:
    """A module for each input, by the name of its part in a condition."""
    width = config.unet.embedding_dim
    found: dict[str, nn.Module] = {}
    if config.embed_dim is not None and config.context_dim is not None:
        found["image"] = ImageConditioner(
            config.embed_dim,
            num_tokens=config.num_image_tokens,
            context_dim=config.context_dim,
            embedding_dim=width,
        )
    if config.text is not None:
        found["text"] = CaptionConditioner(config.text, embedding_dim=width)
    if config.clip_text is not None:
        found["text"] = ClipCaptionConditioner(config.clip_text, embedding_dim=width)
    if config.text_states is not None:
        found["text"] = TextStatesConditioner(config.text_states, embedding_dim=width)
    if config.num_classes is not None:
        found["label"] = LabelConditioner(config.num_classes, embedding_dim=width)
    return found


def _join(told: list[Told]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """One context of all tokens, and its mask where any part has one."""
    with_context = [(part.context, part.context_mask) for part in told if part.context is not None]
    if not with_context:
        return None, None
    context = torch.cat([tokens for tokens, _ in with_context], dim=1)
    if all(mask is None for _, mask in with_context):
        return context, None
    masks = [
        tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask for tokens, mask in with_context
    ]
    return context, torch.cat(masks, dim=1)
