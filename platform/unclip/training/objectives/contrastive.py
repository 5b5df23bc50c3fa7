"""The contrastive loss over the micro-batches of all workers (Radford et al. 2021, figure 3)."""

from __future__ import annotations

import torch
import torch.distributed.nn
from torch import distributed
from torch.nn import functional

from unclip.training.objectives.base import LossOutput, Rows

Embeddings = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Pictures (B, D) and captions (B, D), each of unit norm, and the scale of the logits, a scalar."""


def contrastive_losses(embeddings: Embeddings) -> Rows:
    """Symmetric cross-entropy of this worker's pairs against those of all workers, a row a pair: `loss` and `accuracy`.

    `accuracy` is 1 where the picture is nearest its own caption. The mean over the workers is the loss of the whole batch,
    and so is the mean of their gradients.
    """
    image, text, _ = embeddings
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    return _losses(embeddings, all_image=_gather(image), all_text=_gather(text), first=rank * len(image))


def contrastive_loss(embeddings: Embeddings) -> LossOutput:
    """The means of `contrastive_losses`, and the scale of the logits."""
    output = LossOutput.mean_of(contrastive_losses(embeddings))
    return LossOutput(output.loss, output.metrics | {"logit_scale": embeddings[2].detach()})


def local_contrastive_loss(embeddings: Embeddings) -> LossOutput:
    """The same against this worker's own pairs alone."""
    image, text, _ = embeddings
    return LossOutput.mean_of(_losses(embeddings, all_image=image, all_text=text, first=0))


def _losses(embeddings: Embeddings, *, all_image: torch.Tensor, all_text: torch.Tensor, first: int) -> Rows:
    image, text, scale = embeddings
    target = first + torch.arange(len(image), device=image.device)
    to_text, to_image = scale * image @ all_text.T, scale * text @ all_image.T
    by_picture, by_caption = (
        functional.cross_entropy(logits, target, reduction="none") for logits in (to_text, to_image)
    )
    return {"loss": (by_picture + by_caption) / 2, "accuracy": (to_text.argmax(dim=1) == target).float()}


def _gather(features: torch.Tensor) -> torch.Tensor:
    """(B, D) of this worker -> (world x B, D) of all, with gradients that flow back to the worker they came from."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return features
    return torch.cat(torch.distributed.nn.functional.all_gather(features), dim=0)
