"""The page of an evaluation: its numbers, how captions were scored, the pictures that score highest and lowest, the protocol."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from unclip.data.decode import decode_image
from unclip.evaluation.feature_folder import Features
from unclip.evaluation.metrics import CaptionScores
from unclip.evaluation.pictures import PictureSet
from unclip.utils.html_page import Figure, HtmlPage

_THUMBNAIL = 128
_NAMES = {
    "diversity": "mean cosine distance of two pictures",
    "reference_diversity": "the same of the reference",
    "frechet_distance": "Fréchet distance",
    "cmmd": "CMMD",
    "kernel_distance": "kernel distance (KID)",
    "kernel_distance_std": "its standard deviation over subsets",
    "precision": "precision",
    "recall": "recall",
}


def report_page(
    result: Mapping[str, Any], features: Features, scored: CaptionScores | None, pictures: PictureSet, *, show: int
) -> HtmlPage:
    """The whole page; `show` pictures of highest and as many of lowest CLIP-score."""
    protocol, found = result["protocol"], result["metrics"]
    page = HtmlPage(f"Evaluation of {protocol['pictures']['uri']}")
    against = f" against {result['reference']:,} of {protocol['reference']['uri']}" if protocol["reference"] else ""
    page.note(f"{result['pictures']:,} of {protocol['pictures']['available']:,} pictures{against}.")
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
    page.heading("Protocol")
    page.table([(name, json.dumps(value)) for name, value in _leaves(protocol)])
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
            _thumbnail(images[row]),
            "image/jpeg",
            f"{scored.scores[place]:.3f}: {features.captions[row]} ({features.ids[row]})",
        )
        for place, row in zip(chosen, rows, strict=True)
    ]


def _thumbnail(image: bytes) -> bytes:
    picture, sink = Image.fromarray(decode_image(image, target=_THUMBNAIL)), io.BytesIO()
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    picture.save(sink, "JPEG", quality=85)
    return sink.getvalue()


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every single value by its dotted name."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}" if path else str(name))
    else:
        yield path, value
