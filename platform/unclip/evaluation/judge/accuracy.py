"""Compositional accuracy: the share of pictures that show what their captions say, by attribute and all at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from unclip.evaluation.caption_scores import mean_and_interval
from unclip.evaluation.feature_folder import Features
from unclip.evaluation.judge.examples import UNKNOWN, Labels
from unclip.evaluation.judge.extractor import JUDGE
from unclip.evaluation.judge.folder import Judge
from unclip.evaluation.subject import Metrics


@dataclass(frozen=True)
class Judged:
    """What was found in the M pictures whose captions the judge knows.

    Args:
        rows: (M,) their numbers in the set.
        stated: (M, attributes): positions in the classes; `UNKNOWN` where the caption does not say.
        answers: (M, attributes): the judge's.
        sureness: (M,): the log-probability of what the caption states, the mean over what it states.
        classes: of each attribute.
        metrics: by the name of the attribute, and `all`.
    """

    rows: npt.NDArray[np.int64]
    stated: Labels
    answers: Labels
    sureness: npt.NDArray[np.float64]
    classes: dict[str, tuple[str, ...]]
    metrics: dict[str, Metrics]

    @property
    def is_right(self) -> npt.NDArray[np.bool_]:
        """(M,): whether all that is stated was found."""
        return all_right(self.stated, self.answers)

    def table(self, features: Features) -> pa.Table:
        """`id`, `caption`, and of each attribute what is stated (null where nothing is) and what was found."""
        columns = {
            name: pa.array([None if label == UNKNOWN else classes[label] for label in labels[:, index]], pa.string())
            for index, (attribute, classes) in enumerate(self.classes.items())
            for name, labels in ((attribute, self.stated), (f"{attribute}_found", self.answers))
        }
        captions = [features.captions[row] for row in self.rows]
        return pa.table({"id": features.ids[self.rows], "caption": captions} | columns)


def judged(features: Features, judge: Judge, *, resamples: int, seed: int) -> Judged | None:
    """From the column `judge`; None where the judge knows no caption.

    `metrics` of an attribute are about the `pictures` whose captions state it: `mean`, the share in which it was found,
    with its interval `low` to `high` over captions; `real`, the same share of the real drawings of these captions, which
    their judge had not seen: no generator can be expected to come above it; `constant`: the share that the best constant
    picture would get.
    """
    known = judge.captions
    rows = np.array([row for row, caption in enumerate(features.captions) if caption in known.rows], dtype=np.int64)
    if not len(rows):
        return None
    captions = [str(features.captions[row]) for row in rows]
    at = np.array([known.rows[caption] for caption in captions])
    stated = known.stated[at]
    sizes = [len(classes) for classes in judge.classes.values()]
    log_probabilities = np.split(features.columns[JUDGE][rows].astype(np.float64), np.cumsum(sizes)[:-1], axis=1)
    answers = np.stack([of_attribute.argmax(axis=1) for of_attribute in log_probabilities], axis=1)
    of_stated = [values[np.arange(len(rows)), stated[:, index]] for index, values in enumerate(log_probabilities)]
    sureness = np.nanmean(np.where(stated == UNKNOWN, np.nan, np.stack(of_stated, axis=1)), axis=1)
    metrics: dict[str, Metrics] = {}
    for index, name in enumerate((*judge.classes, "all")):
        columns = slice(None) if name == "all" else slice(index, index + 1)
        says = np.flatnonzero((stated[:, columns] != UNKNOWN).any(axis=1))
        if len(says):
            right = all_right(stated[says, columns], answers[says, columns])
            of_captions = [captions[row] for row in says]
            metrics[name] = {
                "pictures": len(says),
                **mean_and_interval(right.astype(np.float64), of_captions, resamples=resamples, seed=seed),
                "real": float(known.right[at[says], index].mean()),
                "constant": best_constant(stated[says, columns]),
            }
    return Judged(rows, stated, answers, sureness, judge.classes, metrics)


def all_right(stated: Labels, answers: Labels) -> npt.NDArray[np.bool_]:
    """(M, attributes), the same -> (M,): whether each stated attribute was found."""
    right: npt.NDArray[np.bool_] = ((stated == answers) | (stated == UNKNOWN)).all(axis=1)
    return right


def best_constant(stated: Labels) -> float:
    """(M, attributes) -> the largest share of rows of which one and the same picture, that of one of them, would show all
    that is stated."""
    kinds, counts = np.unique(stated, axis=0, return_counts=True)
    return max(float(counts[all_right(kinds, np.broadcast_to(kind, kinds.shape))].sum()) for kind in kinds) / len(
        stated
    )
