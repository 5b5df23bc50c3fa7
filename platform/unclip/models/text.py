"""The text transformer that is trained with the decoder (GLIDE, section 4.1; unCLIP, section 2.1 and Table 3)."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from unclip.config.base import Config
from unclip.models.layers import Depth, Transformer

CLIP_VOCABULARY = 49408
"""Tokens of CLIP's byte-pair encoding."""


class TextTransformerConfig(Config):
    """Shape of a caption encoder."""

    vocab_size: int = Field(default=CLIP_VOCABULARY, ge=1)
    """number of tokens; the default is CLIP's byte-pair encoding"""
    context_length: int = Field(ge=1)
    """tokens of a caption, padding included"""
    width: int = Field(ge=1)
    """width of the token states"""
    depth: Depth
    """number of blocks"""
    heads: int = Field(ge=1)
    """attention heads of a block"""
    pooling: Literal["last_token", "last_position"] = "last_token"
    """whose state stands for the whole caption: the last real token's, or that of the last position, padding or not, as in
    GLIDE's released models"""
    activation_checkpointing: bool = False
    """compute activations again in the backward pass instead of keeping them: less memory, a third more work"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads}: does not divide width = {self.width}")
        return self

    def build(self) -> TextTransformer:
        """The encoder with random weights."""
        return TextTransformer(self)


def caption_mask(tokens: torch.Tensor) -> torch.Tensor:
    """(B, L) tokens of CLIP's byte-pair encoding -> (B, L) bool, True up to the end-of-text token and on it.

    End of text is the highest token, as CLIP's own pooling takes it; padding cannot be told by its value, which is 0
    and also means "!".
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    return positions[None, :] <= tokens.argmax(dim=1, keepdim=True)


def check_caption(tokens: torch.Tensor, mask: torch.Tensor, context_length: int) -> None:
    """Raises `ValueError` unless tokens and mask are both (B, context_length) and the mask is bool."""
    if tokens.shape[1:] != (context_length,) or mask.shape != tokens.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"tokens {tuple(tokens.shape)} and mask {tuple(mask.shape)} {mask.dtype}: "
            f"expected (B, {context_length}) both, the mask bool"
        )


class TextTransformer(nn.Module):
    """Caption -> states of its tokens, with full attention.

    Positions behind the caption's end hold a learned padding embedding instead of being masked, as in GLIDE's released
    models; a caption without any real token (all padding) is the empty caption of classifier-free guidance.
    """

    no_decay = ("positional_embedding", "padding_embedding")

    def __init__(self, config: TextTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.padding_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.transformer = Transformer(
            width=config.width,
            depth=config.depth,
            heads=config.heads,
            activation_checkpointing=config.activation_checkpointing,
        )
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.padding_embedding, std=0.02)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The states (B, L, width), and the one that stands for the whole caption (B, width), see `pooling`.

        Args:
            tokens: (B, context_length) integers.
            mask: (B, context_length) bool, True = real token. Tokens where it is False have no influence.
        """
        check_caption(tokens, mask, self.config.context_length)
        x = self.token_embedding(tokens.long()) + self.positional_embedding
        x = torch.where(mask[..., None], x, self.padding_embedding)
        encodings = self.transformer(x)
        if self.config.pooling == "last_position":
            return encodings, encodings[:, -1]
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        last = (positions * mask).amax(dim=1)
        return encodings, encodings[torch.arange(tokens.shape[0], device=tokens.device), last]
