"""Pictures, against reference pictures and against their captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from unclip.config.base import ConfigError
from unclip.data.batches import Batch
from unclip.data.decode import DecodeError, Picture, decode_image
from unclip.data.manifest import DataError
from unclip.evaluation import metrics
from unclip.evaluation.config import EvaluatePicturesConfig
from unclip.evaluation.extractors import CLIP, ClipExtractor, Extractor, InceptionExtractor
from unclip.evaluation.feature_folder import FeatureFolder, Features
from unclip.evaluation.judge.accuracy import Judged, judged
from unclip.evaluation.judge.extractor import JudgeExtractor
from unclip.evaluation.judge.folder import Judge
from unclip.evaluation.judge.section import add_attributes
from unclip.evaluation.metrics import CaptionScores
from unclip.evaluation.neighbour_section import add_neighbours
from unclip.evaluation.neighbours import memorisation, nearest
from unclip.evaluation.pictures import PictureSet, Unit, choose, open_pictures
from unclip.evaluation.report import pictures_page
from unclip.evaluation.subject import Judgement, Metrics, check_given, settings_of
from unclip.evaluation.weights import absolute_weights
from unclip.pipelines.clips import absolute_clip, load_clip_named
from unclip.utils import storage
from unclip.utils.html_page import HtmlPage

PICTURES, REFERENCE, TRAINING = "pictures", "reference", "training"
_SCORES, _ATTRIBUTES = "scores.parquet", "attributes.parquet"
_SETTINGS = ("limit", "seed", "neighbours", "kid_subsets", "kid_subset_size", "inception_splits", "resamples")
"""Fields that change numbers."""
_ADDRESSES = (PICTURES, REFERENCE, TRAINING, "judge")


class PicturesSubject:
    """Pictures with captions; `ConfigError` or `DataError` where they cannot be judged.

    Args:
        config: with an absolute `out`.
    """

    roles: tuple[str, ...] = (PICTURES, REFERENCE)

    def __init__(self, config: EvaluatePicturesConfig) -> None:
        check_given(config, [PICTURES, "clip"])
        self.config = config = _absolute(config)
        self._networks = _networks(config)
        self.sets: dict[str, PictureSet] = {}
        self.folders: dict[str, FeatureFolder] = {}
        self.protocol: dict[str, Any] = {
            "kind": PICTURES,
            **{name: self._open(name) for name in self._networks},
            "features": _told(self._networks[REFERENCE]),
            "judge": next((judge.protocol for judge in self._judges), None),
            "settings": settings_of(config, _SETTINGS),
        }
        for name in (role for role in self.roles if role in self.folders):
            _check_rows(name, self.protocol[name]["rows"], config)

    def networks(self, name: str) -> Sequence[Extractor]:
        return self._networks[name]

    def inputs(self, name: str, unit: Unit, table: pa.Table) -> Batch:
        uri, captions = self.sets[name].pictures.uri, table.column("caption").to_pylist()
        decoded = [
            _decoded(uri, record, image.as_py())
            for record, image in zip(table.column("id").to_pylist(), table.column("image"), strict=True)
        ]
        inputs: Batch = {}
        for extractor in self.networks(name):
            inputs |= extractor.prepare(decoded, captions)
        return inputs

    def folder_protocol(self, name: str) -> dict[str, Any]:
        return self.protocol[name] | {"features": _told(self._networks[name])}

    def judge(self, gathered: Mapping[str, Features]) -> Judgement:
        own, reference = gathered[PICTURES], gathered.get(REFERENCE)
        scored = metrics.score_captions(own, self.config)
        scored_reference = None if reference is None else metrics.score_captions(reference, self.config)
        found: dict[str, Metrics | None] = {
            **metrics.compare(own, reference, self.config),
            "clip_score": None if scored is None else scored.summary,
            "reference_clip_score": None if scored_reference is None else scored_reference.summary,
        }
        pictures, show = self.sets[PICTURES], self.config.show
        page = pictures_page(self.protocol, found, own, scored, pictures, show=show)
        tables = {} if scored is None else {_SCORES: _score_table(own, scored)}
        attributes = self._judged(own)
        if attributes is not None:
            found |= {f"attribute_{name}": values for name, values in attributes.metrics.items()}
            tables[_ATTRIBUTES] = attributes.table(own)
            add_attributes(page, attributes, own, pictures, show=show)
        if TRAINING in gathered:
            found["training"] = self._compare_with_training(page, gathered)
        return Judgement(found, page, tables)

    def _judged(self, own: Features) -> Judged | None:
        """What the judge found, where there is one that knows a caption."""
        settings = {"resamples": self.config.resamples, "seed": self.config.seed}
        return next((judged(own, judge.judge, **settings) for judge in self._judges), None)

    @property
    def _judges(self) -> list[JudgeExtractor]:
        """One at most."""
        return [network for network in self.networks(PICTURES) if isinstance(network, JudgeExtractor)]

    def _compare_with_training(self, page: HtmlPage, gathered: Mapping[str, Features]) -> Metrics:
        """Adds to the page; what `memorisation` says."""
        own, training, reference = gathered[PICTURES], gathered[TRAINING], gathered.get(REFERENCE)
        found = nearest(own.columns[CLIP], training.columns[CLIP])
        held_out = None if reference is None else nearest(reference.columns[CLIP], training.columns[CLIP])
        config = self.config
        summary = memorisation(found, own.captions, held_out, resamples=config.resamples, seed=config.seed)
        sets = self.sets[PICTURES], self.sets.get(TRAINING)
        add_neighbours(page, summary, found, own, training, *sets, show=config.show)
        return summary

    def _open(self, name: str) -> dict[str, Any] | None:
        """Adds a set or the folder of its features; its protocol."""
        uri: str | None = getattr(self.config, name)
        if uri is None:
            return None
        stored = _stored_features(name, uri, self._networks[name]) if name != PICTURES else None
        if stored is not None:
            self.folders[name] = FeatureFolder(uri)
            return stored
        limit = None if name == TRAINING else self.config.limit
        self.sets[name] = choose(name, open_pictures(name, uri), limit=limit, seed=self.config.seed)
        self.folders[name] = FeatureFolder(storage.join(self.config.out, "features", name))
        return self.sets[name].protocol()


def check_compared(config: EvaluatePicturesConfig) -> None:
    """What can be checked before there are `pictures`: the networks, `reference` and `training`; errors as of
    `PicturesSubject`."""
    check_given(config, ["clip"])
    config = _absolute(config)
    networks = _networks(config)
    for name in (REFERENCE, TRAINING):
        uri: str | None = getattr(config, name)
        if uri is not None and _stored_features(name, uri, networks[name]) is None:
            open_pictures(name, uri)


def _absolute(config: EvaluatePicturesConfig) -> EvaluatePicturesConfig:
    addresses: dict[str, Any] = {"clip": absolute_clip(config.clip)}
    addresses |= {name: storage.absolute(uri) for name in _ADDRESSES if (uri := getattr(config, name))}
    if config.inception is not None:
        addresses["inception"] = absolute_weights(config.inception)
    return config.merged(addresses)


def _networks(config: EvaluatePicturesConfig) -> dict[str, tuple[Extractor, ...]]:
    """Those that see each set, CLIP first."""
    clip = ClipExtractor(config.clip, load_clip_named(config.clip))
    inception = () if config.inception is None else (InceptionExtractor(config.inception),)
    judge = () if config.judge is None else (JudgeExtractor(Judge.load("judge", config.judge)),)
    return {PICTURES: (clip, *inception, *judge), REFERENCE: (clip, *inception), TRAINING: (clip,)}


def _told(networks: Sequence[Extractor]) -> dict[str, Any]:
    """Their protocols, by their names."""
    return {network.columns[0]: network.protocol for network in networks}


def _stored_features(field: str, uri: str, networks: Sequence[Extractor]) -> dict[str, Any] | None:
    """The protocol of features that are there already; None where `uri` has pictures. `ConfigError` where they are of others."""
    protocol = FeatureFolder(uri).protocol()
    if protocol is None:
        return None
    for name, network in _told(networks).items():
        found = protocol["features"].get(name)
        if found is None or {**found, "source": None} != {**network, "source": None}:
            raise ConfigError(
                f"{field} = {uri!r}: its features {name!r} are of another network, or of pictures resized otherwise: "
                f"{found}; they are compared with those of {network}"
            )
    return protocol


def _check_rows(name: str, rows: int, config: EvaluatePicturesConfig) -> None:
    least, what = (
        (2, "diversity") if config.reference is None else (config.neighbours + 1, f"neighbours = {config.neighbours}")
    )
    if rows < least:
        raise ConfigError(f"{name}: {rows} pictures are too few; {what} needs {least}")


def _decoded(uri: str, record: int, image: bytes | None) -> Picture:
    if image is None:
        raise DataError(f"{uri!r}: record {record}: has no image")
    try:
        return decode_image(image)
    except DecodeError as error:
        raise DataError(f"{uri!r}: record {record}: {error}") from error


def _score_table(features: Features, scored: CaptionScores) -> pa.Table:
    captions = [features.captions[row] for row in scored.rows]
    return pa.table({"id": features.ids[scored.rows], "caption": captions, "clip_score": scored.scores})
