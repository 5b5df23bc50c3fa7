"""The ways in which a decoder is told something: each a condition, and a module that makes it fit for the U-Net.

A conditioner takes its own condition to `Told` and knows what stands in for a sample whose input is dropped: it is the
one place where the input is read, so that a dropped one has no way in.

Shapes: B batch, E the U-Net's embedding, W its context's width, L tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from pydantic import Field
from torch import nn

from unclip.config.base import Config
from unclip.models.clip_text import ClipTextConfig
from unclip.models.condition import Condition
from unclip.models.text import TextTransformerConfig


class Told(NamedTuple):
    """What a conditioner gives a U-Net."""

    embedding: torch.Tensor
    """(B, E), added to the time embedding."""
    context: torch.Tensor | None = None
    """(B, L, W), keys and values for every attention."""
    context_mask: torch.Tensor | None = None
    """(B, L) bool, True where the context may be looked at; None = everywhere."""


@dataclass(frozen=True)
class DroppableCondition(Condition):
    """A condition of which rows can be dropped: (B,) bool, True = the model does not see this row's input."""

    dropped: torch.Tensor

    def unconditional(self) -> Self:
        return dataclasses.replace(self, dropped=torch.ones_like(self.dropped))


@dataclass(frozen=True)
class ImageCondition(DroppableCondition):
    """embed: (B, D) CLIP image embedding, normalised as the stage's normaliser does it."""

    embed: torch.Tensor


@dataclass(frozen=True)
class CaptionCondition(DroppableCondition):
    """tokens: (B, L) integers; mask: (B, L) bool, True = real token."""

    tokens: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class TextStatesCondition(DroppableCondition):
    """states: (B, L, S), the last states of CLIP's text encoder; mask: (B, L) bool, True = real token."""

    states: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class LabelCondition(DroppableCondition):
    """label: (B,) int64, the class."""

    label: torch.Tensor


class ImageConditioner(nn.Module):
    """z_i added to the time embedding and as further tokens of the context (unCLIP, section 2.1); dropped: a learned z_i."""

    def __init__(self, embed_dim: int, *, num_tokens: int, context_dim: int, embedding_dim: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.to_time = nn.Linear(embed_dim, embedding_dim)
        self.to_tokens = nn.Linear(embed_dim, num_tokens * context_dim)
        self.null_embed = nn.Parameter(torch.zeros(embed_dim))

    def forward(self, cond: ImageCondition) -> Told:
        embed = torch.where(cond.dropped[:, None], self.null_embed, cond.embed.to(self.null_embed.dtype))
        return Told(self.to_time(embed), self.to_tokens(embed).unflatten(1, (self.num_tokens, -1)))


class CaptionConditioner(nn.Module):
    """A transformer trained with the decoder: all states as context, the last one for the time embedding (GLIDE, 4.1).

    A dropped caption is the empty one, all padding.
    """

    def __init__(self, config: TextTransformerConfig, *, embedding_dim: int) -> None:
        super().__init__()
        self.transformer = config.build()
        self.to_time = nn.Linear(config.width, embedding_dim)

    def forward(self, cond: CaptionCondition) -> Told:
        states, pooled = self.transformer(cond.tokens, cond.mask & ~cond.dropped[:, None])
        return Told(self.to_time(pooled), states)


class TextStatesConfig(Config):
    """Captions as the states of a frozen CLIP's text encoder."""

    context_length: int = Field(ge=1)
    """tokens of a caption, padding included"""
    state_dim: int = Field(ge=1)
    """width of CLIP's text states"""
    width: int = Field(ge=1)
    """width that they are projected to for the attention's context"""


class TextStatesConditioner(nn.Module):
    """CLIP's text states, projected and normalised, as context, the last real one for the time embedding (Karlo).

    Padding is masked. A dropped caption is one without any real token: nothing of it is in the context, and a learned
    state stands for its last one.
    """

    def __init__(self, config: TextStatesConfig, *, embedding_dim: int) -> None:
        super().__init__()
        self.to_context = nn.Linear(config.state_dim, config.width)
        self.norm = nn.LayerNorm(config.width)
        self.to_time = nn.Linear(config.state_dim, embedding_dim)
        self.null_state = nn.Parameter(torch.zeros(config.state_dim))

    def forward(self, cond: TextStatesCondition) -> Told:
        states = cond.states.to(self.null_state.dtype)
        mask = cond.mask & ~cond.dropped[:, None]
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = states[torch.arange(len(states), device=mask.device), (positions * mask).amax(dim=1)]
        pooled = torch.where(mask.any(dim=1, keepdim=True), last, self.null_state)
        return Told(self.to_time(pooled), self.norm(self.to_context(states)), mask)


class ClipCaptionConfig(Config):
    """Captions through a frozen CLIP text transformer, which is part of the decoder."""

    encoder: ClipTextConfig
    """the transformer"""
    width: int = Field(ge=1)
    """width that its states are projected to for the attention's context"""


class ClipCaptionConditioner(nn.Module):
    """CLIP's text states, projected and normalised, as context, its text embedding for the time embedding (Karlo).

    Padding is masked. A dropped caption is the empty one.
    """

    def __init__(self, config: ClipCaptionConfig, *, embedding_dim: int) -> None:
        super().__init__()
        self.encoder = config.encoder.build()
        self.to_context = nn.Linear(config.encoder.width, config.width)
        self.norm = nn.LayerNorm(config.width)
        self.to_time = nn.Linear(config.encoder.embed_dim, embedding_dim)

    def forward(self, cond: CaptionCondition) -> Told:
        tokens, mask = self.encoder.kept_or_empty(cond.tokens, cond.dropped)
        states, embed = self.encoder(tokens, mask)
        return Told(self.to_time(embed), self.norm(self.to_context(states)), mask)


class LabelConditioner(nn.Module):
    """A vector for each class, added to the time embedding (ADM, section 4); dropped: a learned null class."""

    def __init__(self, num_classes: int, *, embedding_dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.vectors = nn.Embedding(num_classes + 1, embedding_dim)

    def forward(self, cond: LabelCondition) -> Told:
        return Told(self.vectors(torch.where(cond.dropped, self.num_classes, cond.label)))
