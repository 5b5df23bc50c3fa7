"""What a CLIP knows of held-out records: which caption is a picture's, and which of a column's labels."""

from __future__ import annotations

import torch

from unclip.models.clip import ClipModel
from unclip.training.config import TrainConfig
from unclip.training.validation.records import HeldOut
from unclip.training.validation.result import Validation


def score_clip(config: TrainConfig, model: ClipModel, records: HeldOut) -> Validation:
    """Retrieval among the held-out records in both directions, and zero-shot accuracy on `validation.label_column`.

    Records without a label do not count in the latter.
    """
    embeds, captions, tokens = [], [], []
    for batch in records.batches(config.microbatch_size):
        embeds.append(model.encode_image(batch["image"]))
        captions.append(model.encode_text(batch["tokens"]))
        tokens.append(batch["tokens"])
    images = torch.cat(embeds)
    metrics = retrieval(images, torch.cat(captions), torch.cat(tokens))
    if config.validation.label_column is not None:
        labels = records.text(config.validation.label_column, records.count)
        named = [row for row, label in enumerate(labels) if label]
        metrics |= zero_shot(model, images[named], [labels[row] for row in named], config.validation.label_prompt)
    return Validation(metrics)


def retrieval(images: torch.Tensor, texts: torch.Tensor, tokens: torch.Tensor) -> dict[str, float]:
    """Shares of pictures whose nearest caption is theirs, and of captions whose nearest picture is.

    A caption that several records share is right for each of them.

    Args:
        images, texts: (N, D) of unit norm, a row a record.
        tokens: (N, L), which tell equal captions.
    """
    group = tokens.unique(dim=0, return_inverse=True)[1]
    similarity = images @ texts.T
    is_right = {
        "retrieval_text": group[similarity.argmax(dim=1)] == group,
        "retrieval_image": group[similarity.argmax(dim=0)] == group,
        "retrieval_chance": group[:, None] == group[None, :],
    }
    return {name: float(right.double().mean()) for name, right in is_right.items()}


def zero_shot(model: ClipModel, images: torch.Tensor, labels: list[str], prompt: str) -> dict[str, float]:
    """Accuracy of the label whose caption is nearest, among all that occur (Radford et al. 2021, section 3.1).

    `zero_shot_most_frequent` is what always saying the commonest label gives.

    Args:
        images: (N, D) of unit norm.
        labels: N of them.
        prompt: the caption that stands for a label, with `{}` in its place.
    """
    classes = sorted(set(labels))
    texts = model.encode_text(model.tokenize([prompt.replace("{}", label) for label in classes]))
    truth = torch.tensor([classes.index(label) for label in labels], device=images.device)
    is_right = (images @ texts.T).argmax(dim=1) == truth
    return {
        "zero_shot": float(is_right.double().mean()),
        "zero_shot_chance": 1 / len(classes),
        "zero_shot_most_frequent": float(truth.bincount().max()) / len(labels),
    }
