"""The diffusion prior: caption -> CLIP image embedding (unCLIP, section 2.2 and Table 3)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional

from unclip.config.base import Config
from unclip.models.condition import Condition
from unclip.models.layers import TimestepMLP, Transformer, zero_init
from unclip.models.text import check_caption

_EXTRA_TOKENS = 4  # text embedding, timestep, noised image embedding, final query


class PriorConfig(Config):
    """Shape of a diffusion prior."""

    embed_dim: int = Field(ge=1)
    """width D of the CLIP embeddings"""
    vocab_size: int = Field(default=49408, ge=1)
    """number of tokens; the default is CLIP's byte-pair encoding"""
    context_length: int = Field(ge=1)
    """tokens of a caption, padding included"""
    width: int = Field(ge=2, multiple_of=2)
    """width of the transformer"""
    depth: int = Field(ge=1)
    """number of blocks"""
    heads: int = Field(ge=1)
    """attention heads of a block"""
    activation_checkpointing: bool = False
    """compute activations again in the backward pass instead of keeping them: less memory, a third more work"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads}: does not divide width = {self.width}")
        return self

    def build(self) -> PriorModel:
        """The model with random weights."""
        return PriorModel(self)


@dataclass(frozen=True)
class PriorCondition(Condition):
    """What the prior is told.

    text_embed: (B, D) CLIP text embedding of unit norm.
    tokens: (B, L) integers.
    text_mask: (B, L) bool, True = real token.
    text_dropped: (B,) bool, True = caption and text embedding are replaced by learned vectors.
    """

    text_embed: torch.Tensor
    tokens: torch.Tensor
    text_mask: torch.Tensor
    text_dropped: torch.Tensor

    def unconditional(self) -> PriorCondition:
        return dataclasses.replace(self, text_dropped=torch.ones_like(self.text_dropped))


class PriorModel(nn.Module):
    """A causal transformer over [caption tokens, text embedding, timestep, noised image embedding, query].

    The output at the query predicts the clean image embedding. Padding is hidden from every other position. Dropping
    the text puts one learned vector at every caption position and one in place of the text embedding, so that what is
    dropped has no influence at all; the noised embedding is never dropped.
    """

    no_decay = ("positional_embedding",)

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        width, length = config.width, config.context_length + _EXTRA_TOKENS
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(length, width))
        self.text_embed_in = nn.Linear(config.embed_dim, width)
        self.time_embed = TimestepMLP(width, width)
        self.image_embed_in = nn.Linear(config.embed_dim, width)
        self.query = nn.Parameter(torch.empty(width))
        self.null_token = nn.Parameter(torch.empty(width))
        self.null_text_embed = nn.Parameter(torch.empty(width))
        self.transformer = Transformer(
            width=width,
            depth=config.depth,
            heads=config.heads,
            activation_checkpointing=config.activation_checkpointing,
        )
        self.image_embed_out = zero_init(nn.Linear(width, config.embed_dim))
        nn.init.normal_(self.positional_embedding, std=0.01)
        for vector in (self.token_embedding.weight, self.query, self.null_token, self.null_text_embed):
            nn.init.normal_(vector, std=0.02)

    def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor, cond: PriorCondition) -> torch.Tensor:
        """The predicted clean embedding (B, D), float32.

        Args:
            x_t: (B, D), the noised, normalised image embedding.
            timesteps: (B,), 0 = least noise.
            cond: see `PriorCondition`.
        """
        check_caption(cond.tokens, cond.text_mask, self.config.context_length)
        dtype = self.image_embed_in.weight.dtype
        dropped = cond.text_dropped[:, None]
        tokens = torch.where(dropped[..., None], self.null_token, self.token_embedding(cond.tokens.long()))
        # A unit vector times sqrt(D) has components of size 1, as linear layers expect.
        text_embed = self.text_embed_in((cond.text_embed.float() * self.config.embed_dim**0.5).to(dtype))
        text_embed = torch.where(dropped, self.null_text_embed, text_embed)
        time = self.time_embed(timesteps, dtype)
        image_embed = self.image_embed_in(x_t.to(dtype))
        extra = torch.stack([text_embed, time, image_embed, self.query.expand_as(time)], dim=1)
        sequence = torch.cat([tokens, extra], dim=1) + self.positional_embedding
        states = self.transformer(sequence, _attention_mask(cond.text_mask | dropped))
        result: torch.Tensor = self.image_embed_out(states[:, -1])
        return result.float()


def _attention_mask(text_mask: torch.Tensor) -> torch.Tensor:
    """(B, L) -> (B, 1, S, S) bool with S = L + 4: causal, padding hidden.

    Padding still sees itself: a query that may look nowhere would be NaN.
    """
    visible = functional.pad(text_mask, (0, _EXTRA_TOKENS), value=True)
    length = visible.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=visible.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=visible.device)
    return (causal & visible[:, None, None, :]) | itself
