"""What z_i holds: pictures from growing numbers of its principal components (unCLIP §4, figure 7)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from unclip.config.base import ConfigError
from unclip.pipelines.cascade import CascadeOutput, GenerationOptions
from unclip.pipelines.draw import StageProgress
from unclip.pipelines.inversion import deterministic
from unclip.pipelines.pipeline import AS_STORED, Pipeline

PAPER_COUNTS = (20, 30, 40, 80, 120, 160, 200, 320)
"""Of 1024 dimensions."""


def partial_embeds(
    image_embed: torch.Tensor, mean: torch.Tensor, components: torch.Tensor, counts: Sequence[int]
) -> torch.Tensor:
    """z_i (N * K, D) of unit norm from the first `counts` components: row `n * K + k` is embedding n by counts[k].

    Args:
        image_embed: (N, D), unit norm.
        mean, components: (D,) and (M, D), orthonormal rows by falling variance.
        counts: K numbers of components, 0 to M each.
    """
    for count in counts:
        if not 0 <= count <= len(components):
            raise ValueError(f"{count} components: there are {len(components)}")
    mean, components = mean.to(image_embed.device).double(), components.to(image_embed.device).double()
    scores = (image_embed.double() - mean) @ components.T
    parts = [mean + scores[:, :count] @ components[:count] for count in counts]
    found = torch.stack(parts, dim=1).flatten(0, 1)
    return functional.normalize(found, dim=1).to(image_embed.dtype)


def probing(
    pipeline: Pipeline,
    image_embed: torch.Tensor,
    *,
    mean: torch.Tensor,
    components: torch.Tensor,
    counts: Sequence[int] = PAPER_COUNTS,
    seed: int = 0,
    options: GenerationOptions = AS_STORED,
    progress: StageProgress | None = None,
) -> CascadeOutput:
    """Pictures of N embeddings by growing numbers of components, by DDIM from one x_T; arguments as for `partial_embeds`."""
    if not pipeline.decoder.config.unit_norm:
        raise ConfigError("decoder.unit_norm = False: components are those of embeddings of unit norm")
    embeds = partial_embeds(image_embed.to(pipeline.device), mean, components, counts)
    return pipeline.draw([seed] * len(embeds), options=deterministic(options), progress=progress).cascade_of(
        image_embed=embeds
    )
