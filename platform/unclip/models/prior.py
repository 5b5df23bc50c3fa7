"""The diffusion prior: caption -> CLIP image embedding (unCLIP, section 2.2 and Table 3).

What it is told, `PriorCondition`, and how that stands in the sequence, `CaptionPrefix`, are also those of the
autoregressive prior.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional

from unclip.config.base import Config
from unclip.models.clip_text import ClipTextConfig
from unclip.models.condition import Condition, PreparedCondition
from unclip.models.layers import Depth, KeyValueCache, Prefix, TimestepMLP, Transformer, causal_mask, zero_init
from unclip.models.text import caption_mask, check_caption

_STEP_TOKENS = 3  # timestep, noised image embedding, final query


class PriorTransformerConfig(Config):
    """Shape of the transformer of either prior."""

    embed_dim: int = Field(ge=1)
    """width D of the CLIP embeddings"""
    vocab_size: int = Field(default=49408, ge=1)
    """number of tokens; the default is CLIP's byte-pair encoding"""
    context_length: int = Field(ge=1)
    """tokens of a caption, padding included"""
    width: int = Field(ge=2, multiple_of=2)
    """width of the transformer"""
    depth: Depth
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

    def build_transformer(self) -> Transformer:
        """The blocks alone, with random weights."""
        return Transformer(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            activation_checkpointing=self.activation_checkpointing,
        )


class PriorConfig(PriorTransformerConfig):
    """Shape of a diffusion prior."""

    clip_text: ClipTextConfig | None = None
    """captions as the states of a frozen CLIP text transformer (Karlo); null: tokens have embeddings of the prior's own"""

    @model_validator(mode="after")
    def _check_clip_text(self) -> Self:
        for name in () if self.clip_text is None else ("embed_dim", "vocab_size", "context_length"):
            mine, theirs = getattr(self, name), getattr(self.clip_text, name)
            if mine != theirs:
                raise ValueError(f"clip_text.{name} = {theirs}: must be {name} = {mine}")
        return self

    def build(self) -> PriorModel:
        """The model with random weights."""
        return PriorModel(self)


@dataclass(frozen=True)
class PriorCondition(Condition):
    """What a prior is told.

    text_embed: (B, D) CLIP text embedding of unit norm.
    tokens: (B, L) integers.
    text_mask: (B, L) bool, True = real token.
    text_dropped: (B,) bool, True = caption and text embedding are replaced by learned vectors.
    """

    text_embed: torch.Tensor
    tokens: torch.Tensor
    text_mask: torch.Tensor
    text_dropped: torch.Tensor

    @classmethod
    def of_captions(
        cls, text_embed: torch.Tensor, tokens: torch.Tensor, text_dropped: torch.Tensor | None = None
    ) -> PriorCondition:
        """Captions given as tokens, whose mask follows from them; `text_dropped` None: no row is dropped."""
        if text_dropped is None:
            text_dropped = tokens.new_zeros(len(tokens), dtype=torch.bool)
        return cls(text_embed.float(), tokens.long(), caption_mask(tokens), text_dropped)

    def unconditional(self) -> PriorCondition:
        return dataclasses.replace(self, text_dropped=torch.ones_like(self.text_dropped))

    def distinct(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows (U,), place (B,)): one row of each that differ in what the prior sees, and which of them each row is like."""
        kept = ~self.text_dropped[:, None]
        seen = [self.tokens, self.text_mask, self.text_embed.float().contiguous().view(torch.int32), kept]
        content = torch.cat([part.long() for part in seen], dim=1) * kept
        _, place, counts = content.unique(dim=0, return_inverse=True, return_counts=True)
        rows = torch.zeros_like(counts).scatter_(0, place, torch.arange(len(place), device=place.device))
        return rows, place


@dataclass(frozen=True)
class PreparedPriorCondition(PreparedCondition):
    """What `PriorModel.prepare` makes of a `PriorCondition`.

    keys_values: (B, depth, 2, heads, L + 1, width / heads), those of caption and text embedding in every block.
    visible: (B, L + 1) bool, what later positions may see of caption and text embedding.
    """

    keys_values: torch.Tensor
    visible: torch.Tensor


class CaptionPrefix(nn.Module):
    """What the sequence of a prior begins with: the caption's L tokens, then the text embedding.

    Dropping the text puts one learned vector at every caption position and one in place of the text embedding, so that
    what is dropped has no influence at all.
    """

    def __init__(self, config: PriorTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.text_embed_in = nn.Linear(config.embed_dim, config.width)
        self.null_token = nn.Parameter(torch.empty(config.width))
        self.null_text_embed = nn.Parameter(torch.empty(config.width))
        for vector in (self.token_embedding.weight, self.null_token, self.null_text_embed):
            nn.init.normal_(vector, std=0.02)

    def forward(self, cond: PriorCondition) -> torch.Tensor:
        """(B, L + 1, width), without positions."""
        check_caption(cond.tokens, cond.text_mask, self.config.context_length)
        dropped = cond.text_dropped[:, None]
        tokens = torch.where(dropped[..., None], self.null_token, self.token_embedding(cond.tokens.long()))
        # A unit vector times sqrt(D) has components of size 1, as linear layers expect.
        scaled = cond.text_embed.float() * self.config.embed_dim**0.5
        text_embed = self.text_embed_in(scaled.to(self.text_embed_in.weight.dtype))
        text_embed = torch.where(dropped, self.null_text_embed, text_embed)
        return torch.cat([tokens, text_embed[:, None]], dim=1)

    def visible(self, cond: PriorCondition) -> torch.Tensor:
        """(B, L + 1) bool: what later positions may see of caption and text embedding.

        Dropped captions show all L positions, which hold the same learned vector whatever the caption was.
        """
        return functional.pad(cond.text_mask | cond.text_dropped[:, None], (0, 1), value=True)


class ClipCaptionPrefix(nn.Module):
    """The same of CLIP's text transformer (Karlo): the states of the caption's tokens, then the text embedding, of any norm.

    A dropped caption is the empty one.
    """

    def __init__(self, config: ClipTextConfig, width: int) -> None:
        super().__init__()
        self.encoder = config.build()
        self.states_in = nn.Linear(config.width, width)
        self.text_embed_in = nn.Linear(config.embed_dim, width)

    def forward(self, cond: PriorCondition) -> torch.Tensor:
        """(B, L + 1, width), without positions."""
        states, text_embed = self.encoder(*self.encoder.kept_or_empty(cond.tokens, cond.text_dropped))
        return torch.cat([self.states_in(states), self.text_embed_in(text_embed)[:, None]], dim=1)

    def visible(self, cond: PriorCondition) -> torch.Tensor:
        """(B, L + 1) bool: what later positions may see."""
        _, mask = self.encoder.kept_or_empty(cond.tokens, cond.text_dropped)
        return functional.pad(mask, (0, 1), value=True)


class PriorModel(nn.Module):
    """A causal transformer over [caption tokens, text embedding, timestep, noised image embedding, query].

    The output at the query predicts the clean image embedding. Padding is hidden from every other position. The noised
    embedding is never dropped.
    """

    no_decay = ("positional_embedding",)

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        width, length = config.width, config.context_length + 1 + _STEP_TOKENS
        self.prefix: CaptionPrefix | ClipCaptionPrefix = (
            CaptionPrefix(config) if config.clip_text is None else ClipCaptionPrefix(config.clip_text, width)
        )
        self.positional_embedding = nn.Parameter(torch.empty(length, width))
        self.time_embed = TimestepMLP(width, width)
        self.image_embed_in = nn.Linear(config.embed_dim, width)
        self.query = nn.Parameter(torch.empty(width))
        self.transformer = config.build_transformer()
        self.image_embed_out = zero_init(nn.Linear(width, config.embed_dim))
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.query, std=0.02)

    @torch.no_grad()
    def prepare(self, cond: PriorCondition) -> PreparedPriorCondition:
        """What no step changes: attention is causal and the caption comes first, so its keys and values do not.

        With a prepared condition the forward pass runs the three last positions only, and gives the same numbers. Rows
        that are told the same, such as all without text, are computed once.
        """
        first, place = cond.distinct()
        told = cond.select(first)
        cache = KeyValueCache(self.config.context_length + 1)
        prefix, visible = self._positioned(self.prefix(told), start=0), self.prefix.visible(told)
        self.transformer(prefix, causal_mask(visible, prefix.shape[1]), earlier=cache, outputs=1)
        return PreparedPriorCondition(keys_values=cache.keys_values(), visible=visible).select(place)

    def forward(
        self, x_t: torch.Tensor, timesteps: torch.Tensor, cond: PriorCondition | PreparedPriorCondition
    ) -> torch.Tensor:
        """The predicted clean embedding (B, D), float32.

        Args:
            x_t: (B, D), the noised, normalised image embedding.
            timesteps: (B,), 0 = least noise.
            cond: see `PriorCondition`; as it is, or prepared.
        """
        dtype = self.image_embed_in.weight.dtype
        time = self.time_embed(timesteps, dtype)
        image_embed = self.image_embed_in(x_t.to(dtype))
        sequence = torch.stack([time, image_embed, self.query.expand_as(time)], dim=1)
        earlier = None
        if isinstance(cond, PreparedPriorCondition):
            earlier, visible = Prefix(cond.keys_values), cond.visible
        else:
            sequence, visible = torch.cat([self.prefix(cond), sequence], dim=1), self.prefix.visible(cond)
        length = sequence.shape[1]
        sequence = self._positioned(sequence, start=len(self.positional_embedding) - length)
        visible = functional.pad(visible, (0, _STEP_TOKENS), value=True)
        states = self.transformer(sequence, causal_mask(visible, length), earlier=earlier, outputs=1)
        result: torch.Tensor = self.image_embed_out(states[:, 0])
        return result.float()

    def _positioned(self, sequence: torch.Tensor, start: int) -> torch.Tensor:
        return sequence + self.positional_embedding[start : start + sequence.shape[1]]
