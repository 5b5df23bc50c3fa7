"""The autoregressive prior: caption -> codes of a CLIP image embedding (unCLIP, section 2.2 and Table 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional

from unclip.models.layers import KeyValueCache, causal_mask, zero_init
from unclip.models.pca_codec import PcaCodec, to_buckets
from unclip.models.prior import CaptionPrefix, PriorCondition, PriorTransformerConfig

Choose = Callable[[int, torch.Tensor], torch.Tensor]
"""choose(index, logits (B, num_buckets)) -> codes (B,): index 0 is the dot product, k is component k - 1."""


class ARPriorConfig(PriorTransformerConfig):
    """Shape of an autoregressive prior."""

    num_components: int = Field(ge=1)
    """principal components K of the image embedding that are predicted; a run takes those of `objective.pca`"""
    num_buckets: int = Field(default=1024, ge=2)
    """values that a component, and the dot product of image and text embedding, may have"""

    @model_validator(mode="after")
    def _check_components(self) -> Self:
        if self.num_components > self.embed_dim:
            raise ValueError(f"num_components = {self.num_components}: embeddings have embed_dim = {self.embed_dim}")
        return self

    def build(self) -> ARPriorModel:
        """The model with random weights, and with the first K axes for principal components."""
        return ARPriorModel(self)


class ARPriorModel(nn.Module):
    """A causal transformer over [caption tokens, text embedding, dot product z_i.z_t, K codes of z_i].

    Each position from the text embedding on predicts the next one. All components share one table of code embeddings
    and one output layer, as their buckets mean the same (`PcaCodec`); positions tell them apart. Where the text is
    dropped a learned vector stands for the dot product too, as that would tell of the text.
    """

    no_decay = ("positional_embedding",)

    def __init__(self, config: ARPriorConfig) -> None:
        super().__init__()
        self.config = config
        width, length = config.width, config.context_length + 1 + config.num_components
        self.codec = PcaCodec(config.embed_dim, config.num_components, config.num_buckets)
        self.prefix = CaptionPrefix(config)
        self.positional_embedding = nn.Parameter(torch.empty(length, width))
        self.dot_embedding = nn.Embedding(config.num_buckets, width)
        self.null_dot = nn.Parameter(torch.empty(width))
        self.code_embedding = nn.Embedding(config.num_buckets, width)
        self.transformer = config.build_transformer()
        self.dot_out = zero_init(nn.Linear(width, config.num_buckets))
        self.code_out = zero_init(nn.Linear(width, config.num_buckets))
        nn.init.normal_(self.positional_embedding, std=0.01)
        for vector in (self.dot_embedding.weight, self.null_dot, self.code_embedding.weight):
            nn.init.normal_(vector, std=0.02)

    def encode(self, image_embed: torch.Tensor, text_embed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is learned of unit vectors z_i and z_t (B, D): the dot product's bucket (B,), and z_i's codes (B, K).

        The dot product's buckets have equal widths between its bounds -1 and 1.
        """
        dots = (image_embed.float() * text_embed.float()).sum(dim=1)
        return to_buckets(dots, 1.0, self.config.num_buckets), self.codec.encode(image_embed)

    def forward(
        self, dots: torch.Tensor, codes: torch.Tensor, cond: PriorCondition
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, float32, of the dot product (B, num_buckets) and of every code (B, K, num_buckets).

        Those of a code follow from the caption, the dot product and the codes before it.

        Args:
            dots: (B,) bucket of z_i.z_t.
            codes: (B, K) as `encode` makes them.
            cond: see `PriorCondition`.
        """
        body = torch.cat([self._dot_token(dots, cond), self.code_embedding(codes[:, :-1])], dim=1)
        sequence = torch.cat([self.prefix(cond), body], dim=1) + self.positional_embedding
        mask = causal_mask(self._visible(cond), sequence.shape[1])
        states = self.transformer(sequence, mask, outputs=1 + self.config.num_components)
        return self.dot_out(states[:, 0]).float(), self.code_out(states[:, 1:]).float()

    @torch.no_grad()
    def generate(self, cond: PriorCondition, choose: Choose) -> torch.Tensor:
        """Codes (B, K) chosen one after the other, each from the logits that those before it give.

        Keys and values of what has passed are kept, so every position passes the transformer once.
        """
        length, total = self.config.context_length + 1, len(self.positional_embedding)
        cache, visible = KeyValueCache(total), self._visible(cond)
        prefix = self.prefix(cond) + self.positional_embedding[:length]
        states = self.transformer(prefix, causal_mask(visible[:, :length], length), earlier=cache, outputs=1)
        token = self._dot_token(choose(0, self.dot_out(states[:, -1]).float()), cond)
        codes: list[torch.Tensor] = []
        for position in range(length, total):
            mask = causal_mask(visible[:, : position + 1], 1)
            states = self.transformer(token + self.positional_embedding[position], mask, earlier=cache)
            codes.append(choose(len(codes) + 1, self.code_out(states[:, -1]).float()))
            token = self.code_embedding(codes[-1])[:, None]
        return torch.stack(codes, dim=1)

    def _visible(self, cond: PriorCondition) -> torch.Tensor:
        """(B, L + 1 + K) bool: what later positions may see."""
        return functional.pad(self.prefix.visible(cond), (0, self.config.num_components), value=True)

    def _dot_token(self, dots: torch.Tensor, cond: PriorCondition) -> torch.Tensor:
        """(B, 1, width)."""
        token = torch.where(cond.text_dropped[:, None], self.null_dot, self.dot_embedding(dots))
        return token[:, None]


def code_losses(
    logits: tuple[torch.Tensor, torch.Tensor], dots: torch.Tensor, codes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropies in nats of what `ARPriorModel.forward` answered: of the dot product (B,), of each code (B, K)."""
    dot_logits, code_logits = logits
    dot_loss = functional.cross_entropy(dot_logits, dots, reduction="none")
    code_loss = functional.cross_entropy(code_logits.transpose(1, 2), codes, reduction="none")
    return dot_loss, code_loss
