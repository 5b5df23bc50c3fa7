"""The page about pictures: their numbers, how captions were scored, the pictures that score highest and lowest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from unclip.evaluation.feature_folder import Features
from unclip.evaluation.metrics import CaptionScores
from unclip.evaluation.pictures import PictureSet
from unclip.evaluation.thumbnails import thumbnail
from unclip.utils.html_page import Figure, HtmlPage

_NAMES = {
    "diversity": "mean cosine distance of two pictures",
    "reference_diversity": "the same of the reference",
    "frechet_distance": "Fréchet distance",
    "cmmd": "CMMD",
    "kernel_distance": "kernel distance (KID)",
    "kernel_distance_std": "its standard deviation over subsets",
    "precision": "precision",
    "recall": "recall",
    "inception_score": "Inception Score",
    "inception_score_std": "its standard deviation over splits",
    "reference_inception_score": "Inception Score of the reference",
    "reference_inception_score_std": "its standard deviation over splits",
}


def pictures_page(
    protocol: Mapping[str, Any],
    found: Mapping[str, Any],
    features: Features,
    scored: CaptionScores | None,
    pictures: PictureSet,
    *,
    show: int,
) -> HtmlPage:
    """All but the protocol.

    Args:
        found: the metrics.
        show: pictures of highest and as many of lowest CLIP-score.
    """
    judged, reference = protocol["pictures"], protocol["reference"]
    page = HtmlPage(f"Evaluation of {judged['uri']}")
    against = f" against {reference['rows']:,} of {reference['uri']}" if reference else ""
    page.note(f"{judged['rows']:,} of {judged['available']:,} pictures{against}.")
    for name in protocol["features"]:
        page.heading(f"Features: {name}")
        page.table([(_NAMES[key], value) for key, value in found[name].items()])
    scores = {"pictures": found["clip_score"], "reference": found["reference_clip_score"]}
    if any(scores.values()):
        page.heading("CLIP-score: cosine of each picture with its caption")
        page.table(list(_score_rows(scores)), ("", "mean", "95% from", "to", "with captions of others", "pictures"))
    if scored is not None:
        page.histograms([("CLIP-score", scored.scores)])
        order = np.argsort(scored.scores, kind="stable")
        for title, chosen in (("Highest", order[::-1][:show]), ("Lowest", order[:show])):
            page.heading(f"{title} CLIP-score")
            page.pictures(_figures(chosen.tolist(), features, scored, pictures))
    return page


def _score_rows(scores: Mapping[str, Mapping[str, Any] | None]) -> Iterator[tuple[str | int | float, ...]]:
    for name, summary in scores.items():
        if summary is not None:
            baseline = "one caption only" if summary["other_captions"] is None else summary["other_captions"]
            yield name, summary["mean"], summary["low"], summary["high"], baseline, summary["pictures"]


def _figures(chosen: Sequence[int], features: Features, scored: CaptionScores, pictures: PictureSet) -> list[Figure]:
    rows = scored.rows[chosen].tolist()
    images = pictures.images(rows)
    return [
        (
            thumbnail(images[row]),
            "image/jpeg",
            f"{scored.scores[place]:.3f}: {features.captions[row]} ({features.ids[row]})",
        )
        for place, row in zip(chosen, rows, strict=True)
    ]
