"""The decoder: CLIP image embedding and caption -> picture of 64 pixels (unCLIP, section 2.1; GLIDE, section 4.1)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import nn

from unclip.config.base import Config
from unclip.models.condition import Condition
from unclip.models.text import TextTransformerConfig
from unclip.models.unet import UNetConfig


class DecoderConfig(Config):
    """Shape of a decoder."""

    unet: UNetConfig
    """the picture's network"""
    text: TextTransformerConfig
    """the caption's network, trained together with it"""
    embed_dim: int = Field(ge=1)
    """width D of the CLIP image embedding"""
    num_image_tokens: int = Field(default=4, ge=1)
    """tokens made of the image embedding for the attention's context"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.unet.attention_resolutions:
            raise ValueError("unet.attention_resolutions = (): the decoder sees its caption through attention only")
        return self

    def build(self) -> DecoderModel:
        """The model with random weights."""
        return DecoderModel(self)


@dataclass(frozen=True)
class DecoderCondition(Condition):
    """What the decoder is told.

    image_embed: (B, D) CLIP image embedding, normalised as the stage's normaliser does it.
    tokens: (B, L) integers.
    text_mask: (B, L) bool, True = real token.
    image_dropped: (B,) bool, True = a learned vector stands in place of the image embedding.
    text_dropped: (B,) bool, True = the empty caption (all padding) stands in place of the caption.
    """

    image_embed: torch.Tensor
    tokens: torch.Tensor
    text_mask: torch.Tensor
    image_dropped: torch.Tensor
    text_dropped: torch.Tensor

    def unconditional(self) -> DecoderCondition:
        return dataclasses.replace(
            self, image_dropped=torch.ones_like(self.image_dropped), text_dropped=torch.ones_like(self.text_dropped)
        )


class DecoderModel(nn.Module):
    """A U-Net that is given the image embedding twice and the caption twice.

    The image embedding is projected and added to the time embedding, and projected to `num_image_tokens` tokens before
    the caption's states in the context of every attention. The caption's last state is projected and added to the
    time embedding, all its states are context.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        width, embedding_dim = config.text.width, config.unet.embedding_dim
        self.text = config.text.build()
        self.unet = config.unet.build(context_dim=width)
        self.text_to_time = nn.Linear(width, embedding_dim)
        self.image_to_time = nn.Linear(config.embed_dim, embedding_dim)
        self.image_to_tokens = nn.Linear(config.embed_dim, config.num_image_tokens * width)
        self.null_image_embed = nn.Parameter(torch.zeros(config.embed_dim))

    def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor, cond: DecoderCondition) -> torch.Tensor:
        """The model output (B, unet.out_channels, H, W), float32.

        Args:
            x_t: (B, unet.in_channels, H, W), the noised picture.
            timesteps: (B,), 0 = least noise.
            cond: see `DecoderCondition`.
        """
        encodings, pooled = self.text(cond.tokens, cond.text_mask & ~cond.text_dropped[:, None])
        dtype = self.null_image_embed.dtype
        image_embed = torch.where(cond.image_dropped[:, None], self.null_image_embed, cond.image_embed.to(dtype))
        image_tokens = self.image_to_tokens(image_embed).unflatten(1, (self.config.num_image_tokens, -1))
        embedding = self.text_to_time(pooled) + self.image_to_time(image_embed)
        context = torch.cat([image_tokens, encodings], dim=1)
        result: torch.Tensor = self.unet(x_t, timesteps, embedding=embedding, context=context)
        return result
