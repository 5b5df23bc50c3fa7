"""A job's folder of pictures: what it was begun with, which units are done, and what there is at the end.

A unit's receipt is written after everything else of it. So what has no receipt is made again and replaces what an attempt
left that was cut short; what no receipt names belongs to nobody, and goes at the end.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from unclip.config.base import ConfigError
from unclip.data.manifest import DataError
from unclip.generation.bulk.prompts import Unit
from unclip.generation.bulk.receipts import Receipt, receipt_name
from unclip.generation.bulk.shards import QUARANTINE_FOLDER
from unclip.utils import storage

MANIFEST = "manifest.json"
SHEET = "grid.png"
SCHEMA_VERSION = 1
_IDENTITY = "generation.json"
_RECEIPTS = "_units"
_THREADS = 32
_SHARDS = re.compile(r"data-\d{5,}\.(parquet|tar)")
_PARTS = re.compile(r"part-\d{5,}\.parquet")
_PICTURES = re.compile(r"\d{5,}-\d+\.png")
_TEMPORARY = re.compile(r"(.+)\.[0-9a-f]{32}\.tmp")
_WRITTEN = re.compile(
    rf"{_SHARDS.pattern}|{_PARTS.pattern}|{_PICTURES.pattern}|\d{{5,}}\.json|{_IDENTITY}|{MANIFEST}|{SHEET}"
)


@dataclass(frozen=True)
class OutputFolder:
    """The pictures at `uri`. Picklable.

    Args:
        uri: absolute.
        identity: JSON values of all that decides what comes out.
        sizes: sides in pixels of the pictures in format folder, each of which is a folder; none in formats of shards.
    """

    uri: str
    identity: Mapping[str, Any]
    sizes: tuple[int, ...]

    def check_same(self) -> None:
        """Raises `ConfigError` naming the field where the folder was begun with another one."""
        found = self._begun_with()
        if found is None:
            self._check_unused()
            return
        mine, theirs = (
            {name.removeprefix("config."): value for name, value in _leaves(identity)}
            for identity in (self.identity, found)
        )
        changed = [name for name in mine | theirs if mine.get(name) != theirs.get(name)]
        if changed:
            now, was = (leaves.get(changed[0], "not given") for leaves in (mine, theirs))
            raise ConfigError(
                f"{changed[0]} = {now}: {self.uri!r} was begun with {was}; choose another out, or delete that folder"
            )

    def begun_with(self, field: str) -> Any:
        """What the folder was begun with; None before."""
        return (self._begun_with() or {}).get(field)

    def begin(self) -> None:
        """Marks the folder as this job's."""
        if self._begun_with() is None:
            storage.write_json(storage.join(self.uri, _IDENTITY), dict(self.identity))

    def reopen(self) -> None:
        """Takes the manifest away, since not everything is there (any more)."""
        storage.remove(storage.join(self.uri, MANIFEST))

    def write_receipt(self, receipt: Receipt) -> None:
        """Commits a unit."""
        storage.write_json(storage.join(self.uri, _RECEIPTS, receipt_name(receipt.unit)), receipt.to_dict())

    def receipts(self, units: Sequence[Unit]) -> dict[int, Receipt]:
        """Of those units that are done, in their order: whose files are there and have the right size."""
        names = set(storage.names(storage.join(self.uri, _RECEIPTS)))
        written = [unit for unit in units if receipt_name(unit.index) in names]
        with ThreadPoolExecutor(_THREADS) as threads:
            found = list(threads.map(self._receipt, written))
        sizes = self._sizes()
        return {
            unit.index: receipt
            for unit, receipt in zip(written, found, strict=True)
            if receipt is not None
            and (receipt.unit, receipt.rows) == (unit.index, unit.rows)
            and all(sizes.get(name) == size for name, size in files_of(receipt))
        }

    def finish(self, receipts: Mapping[int, Receipt], rows: int) -> dict[str, Any]:
        """Takes away what belongs to no unit, and says what there is: the manifest, which is not written yet.

        Raises `DataError` where the counts do not add up to the `rows` prompts of the job.
        """
        counts = _counts(receipts.values())
        if counts["prompts"] != rows or counts["done"] + counts["quarantined"] != rows:
            raise DataError(
                f"{self.uri!r}: of {rows} prompts {counts['done']} are done and {counts['quarantined']} quarantined"
            )
        self._clean({name for receipt in receipts.values() for name, _ in files_of(receipt)})
        ordered = [receipts[unit] for unit in sorted(receipts)]
        return {
            "schema_version": SCHEMA_VERSION,
            **self.identity,
            "rows": counts["pictures"],
            "counts": counts,
            "seconds": round(sum(receipt.seconds for receipt in ordered), 3),
            "shards": [receipt.shard.to_dict() for receipt in ordered if receipt.shard is not None],
            "quarantine": [receipt.quarantine.to_dict() for receipt in ordered if receipt.quarantine is not None],
        }

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Says that everything is there."""
        storage.write_json(storage.join(self.uri, MANIFEST), dict(manifest))

    def _begun_with(self) -> dict[str, Any] | None:
        uri = storage.join(self.uri, _IDENTITY)
        try:
            found = storage.read_json(uri) if storage.exists(uri) else None
        except ValueError:
            return None  # power was lost while it was written, before anything else
        return found if isinstance(found, dict) else None

    def _check_unused(self) -> None:
        """Pictures of unknown origin would be taken for this job's."""
        taken = [name for name in storage.names(self.uri) if name in (MANIFEST, _RECEIPTS)]
        taken += self._unit_files()
        if taken:
            raise ConfigError(
                f"out = {self.uri!r}: has {taken[0]}, which this job did not make; choose an empty folder"
            )

    def _receipt(self, unit: Unit) -> Receipt | None:
        """None where it is damaged, as a machine that loses power can leave it."""
        try:
            return Receipt.from_dict(storage.read_json(storage.join(self.uri, _RECEIPTS, receipt_name(unit.index))))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def _unit_files(self) -> Iterator[str]:
        """Name under the folder of every file that is called like one of a unit."""
        for folder, ours in self._folders().items():
            for name in storage.names(storage.join(self.uri, folder)):
                if ours.fullmatch(name):
                    yield storage.join(folder, name)

    def _folders(self) -> dict[str, re.Pattern[str]]:
        """Where files of units are, and what they are called there."""
        return {"": _SHARDS, QUARANTINE_FOLDER: _PARTS} | {str(size): _PICTURES for size in self.sizes}

    def _sizes(self) -> dict[str, int]:
        """Bytes of every file there by its name under the folder."""
        return {
            storage.join(folder, name): size
            for folder in self._folders()
            for name, size in storage.sizes(storage.join(self.uri, folder)).items()
        }

    def _clean(self, wanted: set[str]) -> None:
        """Takes away files of units that no receipt names, and parts of files that a killed writer left."""
        nobodys = [name for name in self._unit_files() if name not in wanted]
        for folder in (*self._folders(), _RECEIPTS):
            for name in storage.names(storage.join(self.uri, folder)):
                begun = _TEMPORARY.fullmatch(name)
                if (begun is not None and _WRITTEN.fullmatch(begun[1])) or storage.is_probe(name):
                    nobodys.append(storage.join(folder, name))
        for name in nobodys:
            storage.remove(storage.join(self.uri, name))


def files_of(receipt: Receipt) -> Iterator[tuple[str, int]]:
    """Names under the folder and sizes of the files of a unit."""
    if receipt.shard is not None:
        yield receipt.shard.file, receipt.shard.bytes
    if receipt.quarantine is not None:
        yield storage.join(QUARANTINE_FOLDER, receipt.quarantine.file), receipt.quarantine.bytes
    yield from receipt.files.items()


def _counts(receipts: Iterable[Receipt]) -> dict[str, Any]:
    counts: Counter[str] = Counter(prompts=0, done=0, quarantined=0, pictures=0, candidates=0)
    reasons: Counter[str] = Counter()
    for receipt in receipts:
        reasons.update(receipt.quarantined)
        counts.update(
            prompts=receipt.rows,
            done=receipt.done,
            quarantined=sum(receipt.quarantined.values()),
            pictures=receipt.pictures,
            candidates=receipt.candidates,
        )
    return {**counts, "reasons": dict(sorted(reasons.items()))}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every single value as JSON by its dotted name."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}" if path else str(name))
    else:
        yield path, json.dumps(value)
