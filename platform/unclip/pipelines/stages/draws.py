"""What both priors do with a caption: draw several image embeddings, keep the one nearest the text (unCLIP §2.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from unclip.models.prior import PriorCondition
from unclip.pipelines.stages.checks import check_unit_norm
from unclip.utils.random import SampleGenerator

Draw = Callable[[PriorCondition, SampleGenerator], torch.Tensor]
"""draw(cond, streams) -> one z_i (n, D) for each of n conditions, of any norm."""


def best_of_draws(
    draw: Draw, text_embed: torch.Tensor, tokens: torch.Tensor, generator: SampleGenerator, *, num_draws: int
) -> torch.Tensor:
    """z_i (B, D) of unit norm: the best of `num_draws` for each of B captions.

    "We improve quality by generating two samples of z_i and selecting the one with a higher dot product with z_t"
    (§2.2). CLIP's embeddings lie on the unit sphere, and so the draws are put back on it.

    Args:
        draw: called once, with the captions' rows repeated: row `k * B + i` is draw k of caption i.
        text_embed: (B, D) z_t, unit norm.
        tokens: (B, L) int64 in the context length of the stage.
        generator: a stream for each caption; every draw has one of its own.

    Raises `ValueError` where a text embedding is not of unit norm.
    """
    check_unit_norm("text_embed", text_embed)
    batch = len(text_embed)
    streams = SampleGenerator(torch.cat([generator.child(f"draw {index}").keys for index in range(num_draws)]))
    text_embed, tokens = text_embed.repeat(num_draws, 1), tokens.repeat(num_draws, 1)
    cond = PriorCondition.of_captions(text_embed, tokens)
    image_embed = functional.normalize(draw(cond, streams), dim=1)
    similarity = (image_embed * functional.normalize(text_embed, dim=1)).sum(dim=1).view(num_draws, batch)
    best = similarity.argmax(dim=0)
    return image_embed.view(num_draws, batch, -1)[best, torch.arange(batch, device=best.device)]
