"""The part of an evaluation's page about attributes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unclip.evaluation.feature_folder import Features
from unclip.evaluation.judge.accuracy import Judged
from unclip.evaluation.judge.examples import UNKNOWN
from unclip.evaluation.pictures import PictureSet
from unclip.evaluation.thumbnails import thumbnail
from unclip.utils.html_page import Figure, HtmlPage

_HEADER = ("", "share found", "95% from", "to", "in real drawings", "in one constant picture", "pictures")


def add_attributes(page: HtmlPage, judged: Judged, features: Features, pictures: PictureSet, *, show: int) -> None:
    """The table, then at most `show` pictures that are wrong and as many that are right, the surest of both first."""
    page.heading("Attributes: pictures that show what their captions say")
    keys = ("mean", "low", "high", "real", "constant", "pictures")
    page.table([(name, *(found[key] for key in keys)) for name, found in judged.metrics.items()], _HEADER)
    order = np.argsort(judged.sureness, kind="stable")
    right = judged.is_right[order]
    for title, chosen in (("Judged wrong", order[~right]), ("Judged right", order[right][::-1])):
        page.heading(title)
        page.pictures(_figures(chosen[:show].tolist(), judged, features, pictures))


def _figures(chosen: Sequence[int], judged: Judged, features: Features, pictures: PictureSet) -> list[Figure]:
    rows = judged.rows[chosen].tolist()
    images = pictures.images(rows)
    return [
        (thumbnail(images[row]), "image/jpeg", f"{features.captions[row]}: {_verdict(judged, place)}")
        for place, row in zip(chosen, rows, strict=True)
    ]


def _verdict(judged: Judged, place: int) -> str:
    """What was found of all that is stated."""
    found = [
        classes[answer] + ("" if answer == stated else f" for {classes[stated]}")
        for classes, stated, answer in zip(
            judged.classes.values(), judged.stated[place], judged.answers[place], strict=True
        )
        if stated != UNKNOWN
    ]
    return ", ".join(found)
