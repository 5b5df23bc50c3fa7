"""The page about a prior: cosines and recalls beside those of baselines, captions and the pictures nearest to its samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from unclip.evaluation.feature_folder import Features
from unclip.evaluation.pictures import PictureSet
from unclip.evaluation.thumbnails import thumbnail
from unclip.utils.html_page import Figure, HtmlPage

NEAREST = 3
"""Held-out pictures that the page shows of each sampled embedding."""
_GUESSES = {
    "sampled": "sampled by the prior",
    "text_embed": "z_t in place of z_i",
    "mean_embed": "the mean z_i of the others",
    "other_image": "another caption's picture",
    "true": "the true z_i",
    "chance": "chance",
}
_COLUMNS = {
    "cosine_image": "cosine to the true z_i",
    "cosine_image_unrelated": "to others' z_i",
    "cosine_text": "to z_t",
    "cosine_text_unrelated": "to others' z_t",
    "recall_1": "own picture nearest",
    "recall_5": "among the 5 nearest",
    "median_rank": "median rank",
}


def prior_page(
    protocol: Mapping[str, Any],
    found: Mapping[str, Mapping[str, float]],
    features: Features,
    records: pa.Table,
    pictures: PictureSet | None,
    *,
    show: int,
) -> HtmlPage:
    """All but the protocol.

    Args:
        found: the metrics.
        features: with the columns `sampled` and `image_embed`.
        records: `cosine_image`, `cosine_text` and `rank` of each record.
        pictures: those of the same records, where they have some.
        show: captions whose nearest pictures are shown.
    """
    judged = protocol["records"]
    page = HtmlPage(f"Evaluation of the prior in {protocol['bundle']['uri']}")
    page.note(f"{judged['rows']:,} of {judged['available']:,} records of {judged['uri']}.")
    page.heading("Guesses of a caption's image embedding (95% intervals over captions)")
    page.table(
        [(title, *(_cell(found[name], key) for key in _COLUMNS)) for name, title in _GUESSES.items()],
        ("", *_COLUMNS.values()),
    )
    names = ("cosine_image", "cosine_text")
    page.histograms([(f"{_COLUMNS[name]}, sampled", records.column(name).to_numpy()) for name in names])
    if pictures is not None and show:
        page.heading("Captions, their pictures, and the pictures nearest to what the prior sampled")
        titles = ("its own picture", *(f"nearest {place + 1}" for place in range(min(NEAREST, len(features.ids)))))
        page.grid(titles, _rows(features, records, pictures, show))
    return page


def _cell(numbers: Mapping[str, float], name: str) -> str:
    if name not in numbers:
        return ""
    value = f"{numbers[name]:.4g}"
    return (
        f"{value} ({numbers[name + '_low']:.4g} to {numbers[name + '_high']:.4g})"
        if f"{name}_low" in numbers
        else value
    )


def _rows(features: Features, records: pa.Table, pictures: PictureSet, show: int) -> list[tuple[str, Sequence[Figure]]]:
    """Of records that are spread evenly over the set."""
    sampled, real = (features.columns[name].astype(np.float64) for name in ("sampled", "image_embed"))
    chosen = np.linspace(0, len(sampled) - 1, min(show, len(sampled))).round().astype(int)
    cosines = sampled[chosen] @ real.T
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :NEAREST]
    images = pictures.images(sorted({*chosen.tolist(), *nearest.ravel().tolist()}))
    rows: list[tuple[str, Sequence[Figure]]] = []
    for place, row in enumerate(chosen.tolist()):
        shown = [row, *nearest[place].tolist()]
        figures = [(thumbnail(images[other]), "image/jpeg", f"{cosines[place, other]:.3f}") for other in shown]
        rank = records.column("rank")[row].as_py()
        rows.append((f"{features.captions[row]} ({features.ids[row]}), rank {rank}", figures))
    return rows
