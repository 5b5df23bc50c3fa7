"""The part of an evaluation's page about the nearest training pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from unclip.evaluation.feature_folder import Features
from unclip.evaluation.neighbours import Nearest
from unclip.evaluation.pictures import PictureSet
from unclip.evaluation.thumbnails import thumbnail
from unclip.utils.html_page import Figure, HtmlPage

_NAMES = {
    "similarity": "mean cosine to the nearest training picture",
    "largest": "largest",
    "held_out_similarity": "mean of held-out real pictures",
    "held_out_largest": "largest of held-out real pictures",
    "near_from": "cosine that the nearest 1% of these reach",
    "near_share": "share of pictures that reach it",
    "low": "95% from",
    "high": "to",
}


def add_neighbours(
    page: HtmlPage,
    found: Mapping[str, Any],
    nearest: Nearest,
    features: Features,
    training: Features,
    pictures: PictureSet,
    training_pictures: PictureSet | None,
    *,
    show: int,
) -> None:
    """The numbers, then the `show` pictures that are nearest to a training picture, each beside it.

    Args:
        found: by `memorisation`.
        training_pictures: None where only their features are known.
    """
    page.heading("Nearest training pictures, by CLIP")
    page.table([(name, found[key]) for key, name in _NAMES.items() if key in found])
    rows = np.argsort(-nearest.similarities, kind="stable")[:show].tolist()
    trained = nearest.rows[rows].tolist()
    images = pictures.images(rows)
    training_images = training_pictures.images(trained) if training_pictures is not None else {}
    page.grid(
        ("picture", "nearest training picture"),
        [
            (
                f"{nearest.similarities[row]:.4f}",
                (
                    _figure(images[row], features, row),
                    _figure(training_images[other], training, other) if other in training_images else None,
                ),
            )
            for row, other in zip(rows, trained, strict=True)
        ],
    )


def _figure(image: bytes, features: Features, row: int) -> Figure:
    return thumbnail(image), "image/jpeg", f"{features.captions[row] or 'no caption'} ({features.ids[row]})"
