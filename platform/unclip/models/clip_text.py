"""CLIP's text transformer as a frozen part of a prior or decoder: captions as Karlo takes them.

unCLIP (section 2.1) trains a text transformer with the decoder; Karlo has CLIP's in its place, the same in prior and decoder.
Here it is inside the network that uses it, so that a caption reaches that as tokens, like any other's.
"""

from __future__ import annotations

from typing import Any, Self, cast

import torch
from pydantic import Field, model_validator
from torch import nn

from unclip.config.base import Config
from unclip.models.layers import Depth
from unclip.models.text import caption_mask, check_caption


class ClipTextConfig(Config):
    """Shape of CLIP's text transformer."""

    vocab_size: int = Field(default=49408, ge=2)
    """number of tokens; the last two are start and end of text"""
    context_length: int = Field(default=77, ge=2)
    """tokens of a caption, with start, end and padding"""
    width: int = Field(ge=1)
    """width S of the states of a token"""
    depth: Depth
    """number of blocks"""
    heads: int = Field(ge=1)
    """attention heads of a block"""
    embed_dim: int = Field(ge=1)
    """width D of the text embedding"""
    quick_gelu: bool = False
    """True: x * sigmoid(1.702 x) in place of GELU, as OpenAI's weights need it"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads}: does not divide width = {self.width}")
        return self

    def build(self) -> ClipTextEncoder:
        """The transformer with random weights."""
        return ClipTextEncoder(self)


class ClipTextEncoder(nn.Module):
    """Captions -> states of their tokens and text embedding, without gradients. Weights are named as open_clip's."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.tower = _open_clip_tower(config).requires_grad_(False)

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The states (B, L, S) after the final norm, and the embedding (B, D) as CLIP projects it, of no particular norm.

        Args:
            tokens: (B, context_length) integers.
            mask: (B, context_length) bool, True up to the end of text, as `caption_mask` has it.
        """
        check_caption(tokens, mask, self.config.context_length)
        embed, states = self.tower(tokens.long())
        return states, embed

    def kept_or_empty(self, tokens: torch.Tensor, dropped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`tokens` (B, L) with the empty caption where `dropped` (B,), which is how Karlo drops one, and their mask."""
        empty = torch.zeros_like(tokens[:1])
        empty[:, 0], empty[:, 1] = self.config.vocab_size - 2, self.config.vocab_size - 1
        tokens = torch.where(dropped[:, None], empty, tokens)
        return tokens, caption_mask(tokens)


def _open_clip_tower(config: ClipTextConfig) -> nn.Module:
    from open_clip.transformer import QuickGELU, TextTransformer

    activation: Any = QuickGELU if config.quick_gelu else nn.GELU
    return cast(
        "nn.Module",
        TextTransformer(
            context_length=config.context_length,
            vocab_size=config.vocab_size,
            width=config.width,
            heads=config.heads,
            layers=config.depth,
            output_dim=config.embed_dim,
            act_layer=activation,
            output_tokens=True,
        ),
    )
