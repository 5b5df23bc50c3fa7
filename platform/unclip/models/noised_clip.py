"""The noised CLIP: how well a noised picture fits a caption (Nichol et al. 2021, GLIDE, section 4.4).

An ordinary CLIP (Radford et al. 2021) whose picture tower is told the timestep: as in GLIDE's released model, the first
token, where CLIP has its class token, stands for the timestep. Shapes: B batch, L tokens of a caption, D the joint width.
"""

from __future__ import annotations

import math
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional

from unclip.config.base import Config
from unclip.models.layers import Depth, TimestepMLP, Transformer
from unclip.models.text import TextTransformerConfig, caption_mask

_PICTURE_CHANNELS = 3
_FIRST_LOGIT_SCALE = 1 / 0.07  # Radford et al. 2021, section 2.5
_MAX_LOGIT_SCALE = 100.0


class NoisedClipConfig(Config):
    """Shape of a noised CLIP."""

    embed_dim: int = Field(ge=1)
    """width D of the joint space"""
    image_size: int = Field(ge=1)
    """side length in pixels of the noised pictures"""
    patch_size: int = Field(ge=1)
    """side length in pixels of a patch"""
    width: int = Field(ge=2, multiple_of=2)
    """width of the picture's transformer"""
    depth: Depth
    """blocks of the picture's transformer"""
    heads: int = Field(ge=1)
    """attention heads of the picture's transformer"""
    text: TextTransformerConfig
    """the caption's transformer"""
    activation_checkpointing: bool = False
    """compute the picture tower's activations again in the backward pass: less memory, a third more work"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, part, whole_name, whole in (
            ("patch_size", self.patch_size, "image_size", self.image_size),
            ("heads", self.heads, "width", self.width),
        ):
            if whole % part:
                raise ValueError(f"{name} = {part}: does not divide {whole_name} = {whole}")
        return self

    def build(self) -> NoisedClipModel:
        """The model with random weights."""
        return NoisedClipModel(self)


class NoisedPictureTower(nn.Module):
    """Noised picture and timestep -> (B, D), not normalised."""

    no_decay = ("positions",)

    def __init__(self, config: NoisedClipConfig) -> None:
        super().__init__()
        width, patches = config.width, (config.image_size // config.patch_size) ** 2
        self.image_size = config.image_size
        self.patches = nn.Conv2d(_PICTURE_CHANNELS, width, config.patch_size, stride=config.patch_size, bias=False)
        self.time_embed = TimestepMLP(width, width)
        self.positions = nn.Parameter(torch.empty(1 + patches, width))
        self.input_norm = nn.LayerNorm(width)
        self.transformer = Transformer(
            width=width,
            depth=config.depth,
            heads=config.heads,
            activation_checkpointing=config.activation_checkpointing,
        )
        self.projection = nn.Linear(width, config.embed_dim, bias=False)
        nn.init.normal_(self.positions, std=width**-0.5)
        nn.init.normal_(self.projection.weight, std=width**-0.5)

    def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        expected = (_PICTURE_CHANNELS, self.image_size, self.image_size)
        if x_t.shape[1:] != expected:
            raise ValueError(f"x_t is {tuple(x_t.shape)}: expected (B, {', '.join(map(str, expected))})")
        dtype = self.positions.dtype
        tokens = self.patches(x_t.to(dtype)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.time_embed(timesteps, dtype)[:, None], tokens], dim=1) + self.positions
        states = self.transformer(self.input_norm(tokens))
        result: torch.Tensor = self.projection(states[:, 0])
        return result


class CaptionTower(nn.Module):
    """Caption -> (B, D), not normalised: the state of its end-of-text token, projected."""

    def __init__(self, config: NoisedClipConfig) -> None:
        super().__init__()
        self.text = config.text.build()
        self.projection = nn.Linear(config.text.width, config.embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=config.text.width**-0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.projection(self.text(tokens, caption_mask(tokens))[1])
        return result


class NoisedClipModel(nn.Module):
    """f(x_t, t) and g(c) of GLIDE: embeddings are float32 or wider, and of unit norm."""

    def __init__(self, config: NoisedClipConfig) -> None:
        super().__init__()
        self.config = config
        self.picture_tower = NoisedPictureTower(config)
        self.caption_tower = CaptionTower(config)
        # Of shape (1,), since DeepSpeed cannot broadcast a parameter without dimensions.
        self.log_scale = nn.Parameter(torch.full((1,), math.log(_FIRST_LOGIT_SCALE)))

    def encode_image(self, x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) noised pictures in S = `image_size` and their timesteps (B,) -> (B, D)."""
        return functional.normalize(_widened(self.picture_tower(x_t, timesteps)), dim=1)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, L) tokens of CLIP's byte-pair encoding -> (B, D)."""
        return functional.normalize(_widened(self.caption_tower(tokens)), dim=1)

    @property
    def logit_scale(self) -> torch.Tensor:
        """What cosines are multiplied with before the softmax: a scalar, at most 100."""
        return _widened(self.log_scale).exp().clamp(max=_MAX_LOGIT_SCALE).reshape(())

    def forward(
        self, x_t: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For training: picture embeddings (B, D), caption embeddings (B, D) and the scale of the logits."""
        return self.encode_image(x_t, timesteps), self.encode_text(tokens), self.logit_scale


def _widened(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32, or wider where it is: cosines of thousands of pairs are told apart by small differences."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
