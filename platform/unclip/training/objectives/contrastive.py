"""The contrastive loss over the micro-batches of all workers (Radford et al. 2021, figure 3)."""

from __future__ import annotations

import torch
import torch.distributed.nn
from torch import distributed
from torch.nn import functional

from unclip.training.objectives.base import LossOutput

Embeddings = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Pictures (B, D) and captions (B, D), each of unit norm, and the scale of the logits, a scalar."""


def contrastive_loss(embeddings: Embeddings) -> LossOutput:
    """Symmetric cross-entropy of this worker's pairs against those of all workers; pictures matched as `accuracy`."""
    image, text, _ = embeddings
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    return _loss(embeddings, all_image=_gather(image), all_text=_gather(text), first=rank * len(image))


def local_contrastive_loss(embeddings: Embeddings) -> LossOutput:
    """The same against this worker's own pairs alone."""
    image, text, _ = embeddings
    return _loss(embeddings, all_image=image, all_text=text, first=0)


def _loss(embeddings: Embeddings, *, all_image: torch.Tensor, all_text: torch.Tensor, first: int) -> LossOutput:
    image, text, scale = embeddings
    target = first + torch.arange(len(image), device=image.device)
    to_text, to_image = scale * image @ all_text.T, scale * text @ all_image.T
    loss = (functional.cross_entropy(to_text, target) + functional.cross_entropy(to_image, target)) / 2
    accuracy = (to_text.argmax(dim=1) == target).float().mean()
    return LossOutput(loss, {"accuracy": accuracy, "logit_scale": scale.detach()})


def _gather(features: torch.Tensor) -> torch.Tensor:
    """(B, D) of this worker -> (world x B, D) of all, with gradients that flow back to the worker they came from."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return features
    return torch.cat(torch.distributed.nn.functional.all_gather(features), dim=0)
