"""What both priors do with a caption: draw several image embeddings, keep the one nearest the text (unCLIP §2.2)."""

from __future__ import annotations

import torch
from torch.nn import functional

from unclip.models.prior import PriorCondition
from unclip.utils.random import SampleGenerator


def draws_of(
    text_embed: torch.Tensor, tokens: torch.Tensor, generator: SampleGenerator, num_draws: int
) -> tuple[torch.Tensor, torch.Tensor, SampleGenerator]:
    """The rows of `num_draws` draws for each of B captions, each with a stream of its own.

    Row `k * B + i` is draw k of caption i.
    """
    streams = SampleGenerator(torch.cat([generator.child(f"draw {index}").keys for index in range(num_draws)]))
    return text_embed.repeat(num_draws, 1), tokens.repeat(num_draws, 1), streams


def of_all_draws(cond: PriorCondition, num_draws: int) -> PriorCondition:
    """What each of `num_draws` draws is told, in the order of `draws_of`."""
    return cond.map(lambda tensor: tensor.repeat(num_draws, *[1] * (tensor.ndim - 1)))


def best_draw(image_embed: torch.Tensor, text_embed: torch.Tensor) -> torch.Tensor:
    """z_i (B, D): of the draws `image_embed` (K * B, D), unit norm, in the order of `draws_of`, the best for each caption.

    "We improve quality by generating two samples of z_i and selecting the one with a higher dot product with z_t"
    (§2.2), `text_embed` (B, D).
    """
    draws = image_embed.view(-1, *text_embed.shape)
    best = (draws * functional.normalize(text_embed, dim=1)).sum(dim=2).argmax(dim=0)
    return draws[best, torch.arange(len(best), device=best.device)]
