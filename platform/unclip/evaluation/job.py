"""An evaluation before and after its work: what is checked first, what is to be made, and what there is at the end.

>>> job = EvaluationJob.prepare(config, clip)
>>> job.begin()
>>> for extractor in job.extractors:
...     extractor.setup("cpu")
>>> for name, units in job.missing().items():
...     for unit in job.prepare_units(name, units):
...         job.write(unit, extract_all(job.extractors, unit.inputs, config.microbatch))
>>> result = job.finish()
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from unclip.config.base import ConfigError
from unclip.data.batches import Batch
from unclip.data.decode import DecodeError, Picture, decode_image
from unclip.data.ingest.shards import write_tables
from unclip.data.manifest import DataError
from unclip.evaluation import metrics
from unclip.evaluation.config import EvaluateConfig
from unclip.evaluation.extractors import ClipExtractor, Extractor, InceptionExtractor
from unclip.evaluation.feature_folder import FeatureFolder, Features
from unclip.evaluation.metrics import CaptionScores
from unclip.evaluation.pictures import PictureSet, Unit, choose, open_pictures
from unclip.evaluation.report import report_page
from unclip.utils import storage

if TYPE_CHECKING:
    from unclip.models.clip import ClipModel

SCHEMA_VERSION = 1
PICTURES, REFERENCE = "pictures", "reference"
DRIVER_FILE = "_driver.json"
_PROTOCOL, _RESULT, _REPORT, _SCORES, _FEATURES = (
    "protocol.json",
    "result.json",
    "report.html",
    "scores.parquet",
    "features",
)
_SETTINGS = ("limit", "seed", "neighbours", "kid_subsets", "kid_subset_size", "resamples")
"""Fields that change numbers."""
_LIBRARIES = ("numpy", "open_clip_torch", "pillow", "torch", "torchvision")


class PreparedUnit(NamedTuple):
    """A unit as the networks want it.

    Args:
        name: of the set.
        number: of the unit.
        ids: (B,) int64.
        captions: B texts, None where there is none.
        inputs: arrays with B rows.
    """

    name: str
    number: int
    ids: npt.NDArray[np.int64]
    captions: Sequence[str | None]
    inputs: Batch


@dataclass(frozen=True)
class EvaluationJob:
    """An evaluation whose inputs were all found right. Picklable.

    Args:
        config: with absolute addresses.
        extractors: that of CLIP first.
        sets: the pictures whose features this job makes, by name.
        features: the folders of features that are compared, by name; the reference's may be of an earlier evaluation.
        protocol: all that decides the numbers, as JSON values.
    """

    config: EvaluateConfig
    extractors: tuple[Extractor, ...]
    sets: Mapping[str, PictureSet]
    features: Mapping[str, FeatureFolder]
    protocol: Mapping[str, Any]

    @classmethod
    def prepare(cls, config: EvaluateConfig, clip: ClipModel) -> EvaluationJob:
        """Checks everything that can be checked before features are made; nothing is written that stays.

        Raises `ConfigError` for a bad field or an `out` that was begun with another protocol, `DataError` for pictures
        that cannot be read, `OSError` where `out` cannot be written.

        Args:
            config: with `clip` as it means the same on every node.
            clip: the CLIP that it names.
        """
        for field in ("pictures", "clip", "out"):
            if not getattr(config, field):
                raise ConfigError(f"{field}: required, but not given")
        addresses = {field: getattr(config, field) for field in ("pictures", "reference", "inception", "out")}
        config = config.merged({field: storage.absolute(uri) for field, uri in addresses.items() if uri is not None})
        extractors: list[Extractor] = [ClipExtractor(config.clip, clip)]
        if config.inception is not None:
            extractors.append(InceptionExtractor(config.inception))
        networks = {extractor.columns[0]: extractor.protocol for extractor in extractors}
        sets = {PICTURES: _chosen(PICTURES, config.pictures, config)}
        features = {PICTURES: FeatureFolder(storage.join(config.out, _FEATURES, PICTURES))}
        protocol: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            PICTURES: sets[PICTURES].protocol(),
            REFERENCE: None,
            "features": networks,
            "settings": {name: value for name, value in config.to_dict().items() if name in _SETTINGS},
        }
        if config.reference is not None:
            protocol[REFERENCE] = _stored_reference(config.reference, networks)
            features[REFERENCE] = FeatureFolder(config.reference)
            if protocol[REFERENCE] is None:
                sets[REFERENCE] = _chosen(REFERENCE, config.reference, config)
                protocol[REFERENCE] = sets[REFERENCE].protocol()
                features[REFERENCE] = FeatureFolder(storage.join(config.out, _FEATURES, REFERENCE))
        for name in features:
            _check_rows(name, protocol[name]["rows"], config)
        job = cls(config, tuple(extractors), sets, features, protocol)
        storage.check_writable(config.out)
        job._check_same()
        return job

    @property
    def rows(self) -> int:
        """Pictures whose features this job makes."""
        return sum(pictures.rows for pictures in self.sets.values())

    def result(self) -> dict[str, Any] | None:
        """What `finish` returned; None before."""
        uri = storage.join(self.config.out, _RESULT)
        return dict(storage.read_json(uri)) if storage.exists(uri) else None

    def begin(self) -> None:
        """Marks the folder as this job's."""
        if not storage.exists(storage.join(self.config.out, _PROTOCOL)):
            storage.write_json(storage.join(self.config.out, _PROTOCOL), dict(self.protocol))

    def missing(self) -> dict[str, list[Unit]]:
        """The units that have no features yet, of each set that has such."""
        missing = {name: self.features[name].missing(pictures.units) for name, pictures in self.sets.items()}
        return {name: units for name, units in missing.items() if units}

    def prepare_units(self, name: str, units: Sequence[Unit]) -> Iterator[PreparedUnit]:
        """Reads and decodes units of a set; `DataError` names the record that cannot be used."""
        pictures = self.sets[name]
        for unit, table in pictures.read(units):
            ids, captions = table.column("id").to_numpy(), table.column("caption").to_pylist()
            decoded = [
                _decoded(pictures.pictures.uri, record, image.as_py())
                for record, image in zip(ids.tolist(), table.column("image"), strict=True)
            ]
            inputs: Batch = {}
            for extractor in self.extractors:
                inputs |= extractor.prepare(decoded, captions)
            yield PreparedUnit(name, unit.number, ids, captions, inputs)

    def write(self, unit: PreparedUnit, features: Batch) -> None:
        """Keeps a unit's features."""
        self.features[unit.name].write(unit.number, unit.ids, unit.captions, features)

    def finish(self) -> dict[str, Any]:
        """Once all features are there: compares them, writes scores and page and, last, the result, which it returns."""
        out = self.config.out
        gathered = {name: self._gather(name) for name in self.features}
        own, reference = gathered[PICTURES], gathered.get(REFERENCE)
        scored = metrics.score_captions(own, self.config)
        scored_reference = None if reference is None else metrics.score_captions(reference, self.config)
        result = {
            "protocol": dict(self.protocol),
            "pictures": len(own.ids),
            "reference": None if reference is None else len(reference.ids),
            "metrics": {
                **metrics.compare(own, reference, self.config),
                "clip_score": None if scored is None else scored.summary,
                "reference_clip_score": None if scored_reference is None else scored_reference.summary,
            },
            "versions": {library: version(library) for library in _LIBRARIES},
        }
        if scored is not None:
            _write_scores(storage.join(out, _SCORES), own, scored)
        content = report_page(result, own, scored, self.sets[PICTURES], show=self.config.show).html()
        storage.write_bytes(storage.join(out, _REPORT), content.encode())
        storage.write_json(storage.join(out, _RESULT), result)
        return result

    def _gather(self, name: str) -> Features:
        folder = self.features[name]
        if name in self.sets:
            folder.finish(self.sets[name], self.protocol[name] | {"features": self.protocol["features"]})
        return folder.read([column for extractor in self.extractors for column in extractor.columns])

    def _check_same(self) -> None:
        """Raises `ConfigError` where the folder was begun with another protocol, or is not an evaluation's."""
        out = self.config.out
        if not storage.exists(storage.join(out, _PROTOCOL)):
            if [name for name in storage.names(out) if name != DRIVER_FILE and not storage.is_probe(name)]:
                raise ConfigError(f"out = {out!r}: holds files that this job did not make; choose an empty folder")
            return
        found = storage.read_json(storage.join(out, _PROTOCOL))
        changed = [name for name, value in self.protocol.items() if found.get(name) != value]
        if changed:
            was, now = (json.dumps(protocol.get(changed[0])) for protocol in (found, self.protocol))
            raise ConfigError(
                f"out = {out!r}: was begun with {changed[0]} = {was}, now it is {now}; choose another folder, or delete "
                "this one"
            )


def _chosen(name: str, uri: str, config: EvaluateConfig) -> PictureSet:
    return choose(name, open_pictures(name, uri), limit=config.limit, seed=config.seed)


def _stored_reference(uri: str, networks: Mapping[str, Any]) -> dict[str, Any] | None:
    """The protocol of features that are there already; None where `uri` has pictures. `ConfigError` where they are of others."""
    protocol = FeatureFolder(uri).protocol()
    if protocol is None:
        return None
    for name, network in networks.items():
        found = protocol["features"].get(name)
        if found is None or {**found, "source": None} != {**network, "source": None}:
            raise ConfigError(
                f"reference = {uri!r}: its features {name!r} are of another network, or of pictures resized otherwise: "
                f"{found}; they are compared with those of {network}"
            )
    return protocol


def _check_rows(name: str, rows: int, config: EvaluateConfig) -> None:
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


def _write_scores(uri: str, features: Features, scored: CaptionScores) -> None:
    captions = [features.captions[row] for row in scored.rows]
    table = pa.table({"id": features.ids[scored.rows], "caption": captions, "clip_score": scored.scores})
    write_tables(uri, table.schema, [table])
