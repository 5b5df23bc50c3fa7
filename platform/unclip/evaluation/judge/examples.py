"""The pictures that a judge learns from, with what they show, and their folds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from unclip.config.base import ConfigError
from unclip.data.decode import DecodeError, decode_image
from unclip.data.manifest import DataError, Manifest, read_slices, records_identity, scan
from unclip.data.openmoji_captions import NO_ATTRIBUTE
from unclip.evaluation.extractors import central_square
from unclip.evaluation.judge.config import TrainJudgeConfig

Labels = npt.NDArray[np.int64]
UNKNOWN = -1
"""The label of what is neither learned nor judged."""


@dataclass(frozen=True)
class Examples:
    """N pictures of records.

    Args:
        pictures: (N, S, S, 3) uint8.
        captions: N texts.
        classes: of each attribute, sorted; `none` is one of them where a picture does not have the attribute.
        labels: (N, attributes): positions in `classes`, or `UNKNOWN`.
        folds: (N,): the network that does not see the picture.
        sources: of each folder its address, a hash of its content and how many records it has.
    """

    pictures: npt.NDArray[np.uint8]
    captions: Sequence[str]
    classes: Mapping[str, tuple[str, ...]]
    labels: Labels
    folds: npt.NDArray[np.int64]
    sources: Sequence[Mapping[str, Any]]

    @property
    def is_stated(self) -> npt.NDArray[np.bool_]:
        """(N, attributes): whether a picture has the attribute, and a judge knows what it has."""
        none = [_position(classes, NO_ATTRIBUTE) for classes in self.classes.values()]
        return (self.labels != UNKNOWN) & (self.labels != np.array(none))


def read_examples(config: TrainJudgeConfig) -> Examples:
    """The pictures of `config.records` that have an attribute; `ConfigError` or `DataError` names what is missing or of no
    use. The others are left out: next to flags and fruit, a blue square of a kind that was not seen looks like none."""
    if not config.records:
        raise ConfigError("records: required, but not given")
    manifests = [scan(uri, ("id", "image", "caption", *config.attributes)) for uri in config.records]
    rows = [row for manifest in manifests for row in _rows(manifest, config)]
    if not rows:
        raise ConfigError(f"attributes: no picture has one of {', '.join(config.attributes)}")
    pictures = np.stack([picture for picture, _, _ in rows])
    captions = [caption for _, caption, _ in rows]
    values = np.array([shown for _, _, shown in rows], dtype=object)
    classes = {name: tuple(sorted(set(values[:, index]))) for index, name in enumerate(config.attributes)}
    columns = [[classes[name].index(value) for value in values[:, i]] for i, name in enumerate(config.attributes)]
    labels = np.array(columns, dtype=np.int64).T
    folds = _folds(labels, _groups(pictures, captions), config.folds, config.seed)
    labels = _known(labels, folds)
    for name, column in zip(classes, labels.T, strict=True):
        if len(np.unique(column[column != UNKNOWN])) < 2:
            raise ConfigError(f"attributes: {name!r} has one class that can be learned, or none, in these records")
    sources = [
        {"uri": manifest.uri, "identity": records_identity(manifest), "rows": manifest.rows} for manifest in manifests
    ]
    return Examples(pictures, captions, classes, labels, folds, sources)


def _rows(manifest: Manifest, config: TrainJudgeConfig) -> list[tuple[npt.NDArray[np.uint8], str, list[str]]]:
    rows = []
    columns = ("id", "image", "caption", *config.attributes)
    for index, fragment in enumerate(manifest.fragments):
        for record in read_slices(manifest, [(index, 0, fragment.rows)], columns).to_pylist():
            shown = [str(record[name] or NO_ATTRIBUTE) for name in config.attributes]
            if set(shown) == {NO_ATTRIBUTE}:
                continue
            try:
                picture = central_square(decode_image(record["image"] or b""), config.image_size)
            except DecodeError as error:
                raise DataError(f"{manifest.uri!r}: record {record['id']}: {error}") from error
            rows.append((picture, record["caption"] or "", shown))
    return rows


def _groups(pictures: npt.NDArray[np.uint8], captions: Sequence[str]) -> npt.NDArray[np.int64]:
    """(N,): the same number for pictures of one caption or with the same pixels, directly or through others."""
    numbers: dict[str, int] = {}
    edges = [
        (row, numbers.setdefault(key, len(pictures) + len(numbers)))
        for row, (picture, caption) in enumerate(zip(pictures, captions, strict=True))
        for key in (f"caption {caption}", f"pixels {hashlib.sha256(picture.tobytes()).hexdigest()}")
    ]
    size = len(pictures) + len(numbers)
    graph = coo_array((np.ones(len(edges)), np.array(edges).T), shape=(size, size))
    groups: npt.NDArray[np.int64] = connected_components(graph, directed=False)[1][: len(pictures)]
    return groups


def _folds(labels: Labels, groups: npt.NDArray[np.int64], folds: int, seed: int) -> npt.NDArray[np.int64]:
    """(N,): each group whole in one of `folds`, every class spread over as many as it can be.

    Groups with the rarest classes come first; each goes where its rarest class is least seen, then its next, and so on.
    """
    random = np.random.default_rng(seed)
    rows_of = {group: np.flatnonzero(groups == group) for group in random.permutation(np.unique(groups))}
    shown = {
        group: sorted({(index, int(label)) for row in rows for index, label in enumerate(labels[row])})
        for group, rows in rows_of.items()
    }
    frequency: dict[tuple[int, int], int] = {}
    for classes in shown.values():
        for pair in classes:
            frequency[pair] = frequency.get(pair, 0) + 1
    by_rarity = {group: sorted(classes, key=frequency.__getitem__) for group, classes in shown.items()}
    seen = {pair: np.zeros(folds, dtype=np.int64) for pair in frequency}
    result = np.empty(len(labels), dtype=np.int64)
    for group in sorted(by_rarity, key=lambda group: [frequency[pair] for pair in by_rarity[group]]):
        fold = min(range(folds), key=lambda fold: [int(seen[pair][fold]) for pair in by_rarity[group]])
        for pair in by_rarity[group]:
            seen[pair][fold] += 1
        result[rows_of[group]] = fold
    return result


def _known(labels: Labels, folds: npt.NDArray[np.int64]) -> Labels:
    """The labels without classes that are all in one fold: the network that judges them would have seen none."""
    known = labels.copy()
    for column in known.T:
        for label in np.unique(column):
            if len(np.unique(folds[column == label])) < 2:
                column[column == label] = UNKNOWN
    return known


def _position(classes: Sequence[str], value: str) -> int:
    return classes.index(value) if value in classes else UNKNOWN
