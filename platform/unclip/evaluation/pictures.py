"""Sets of records that can be judged: pictures with captions, what jobs/generate.py wrote, embeddings; read in units.

A unit is a few records of one row group or tar. Which pictures it has follows from the set, `limit` and `seed` alone, so
what is made of a unit is the same whoever makes it, and is made once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from unclip.config.base import ConfigError
from unclip.data.manifest import FACTS_FILE, DataError, Manifest, read_slices, records_identity, scan
from unclip.data.sources.webdataset import Tar, WebDatasetSource, WebDatasetSourceConfig
from unclip.utils import storage

UNIT_ROWS = 256
"""Records of a unit at most."""
UNIT_BYTES = 40 * 2**20
"""Of a unit's decoded pictures at most, as far as that is known: 256 of 224 pixels."""
_TOLD = ("bundle", "prompts", "config", "settings", "counts", "records_sha256")
"""What a folder's manifest says of how its pictures came about: it belongs to the protocol."""


class Pictures(Protocol):
    """A folder of pictures, or of other things that records have. Picklable."""

    @property
    def uri(self) -> str:
        """Absolute."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """What its manifest says."""
        ...

    @property
    def rows(self) -> Sequence[int]:
        """Pictures of each fragment: of each row group or tar."""
        ...

    @property
    def identity(self) -> str:
        """A hash that changes when the pictures do."""
        ...

    def read(self, fragment: int) -> pa.Table:
        """`id` int64, `caption` (may be null) and what is judged, as `image` (encoded), of a fragment, in order.

        Raises `DataError` where it does not hold what it held.
        """
        ...


@dataclass(frozen=True)
class ParquetPictures:
    """Records, or shards of a generation job in format parquet.

    Args:
        manifest: where they are.
        caption_column: of a generation job `prompt`; None where nothing is said of the pictures.
        columns: what is judged.
    """

    manifest: Manifest
    caption_column: str | None
    columns: tuple[str, ...] = ("image",)

    @property
    def uri(self) -> str:
        return self.manifest.uri

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.manifest.facts

    @property
    def rows(self) -> Sequence[int]:
        return [fragment.rows for fragment in self.manifest.fragments]

    @property
    def identity(self) -> str:
        return records_identity(self.manifest, in_place=True)

    def read(self, fragment: int) -> pa.Table:
        columns = ["id", *self.columns, *([self.caption_column] if self.caption_column else [])]
        table = read_slices(self.manifest, [(fragment, 0, self.manifest.fragments[fragment].rows)], columns)
        if self.caption_column is None:
            table = table.append_column("caption", pa.nulls(table.num_rows, pa.string()))
        return table.rename_columns(["id", *self.columns, "caption"])


@dataclass(frozen=True)
class TarPictures:
    """Shards of a generation job in format webdataset, whose keys are ids.

    Args:
        uri: absolute.
        facts: of its manifest, which lists the tars.
    """

    uri: str
    facts: Mapping[str, Any]

    @property
    def rows(self) -> Sequence[int]:
        return [shard["rows"] for shard in self.facts["shards"]]

    @property
    def identity(self) -> str:
        hashes = [[shard["file"], shard["sha256"]] for shard in self.facts["shards"]]
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()

    def read(self, fragment: int) -> pa.Table:
        shard = self.facts["shards"][fragment]
        uri = storage.join(self.uri, shard["file"])
        source = WebDatasetSource(WebDatasetSourceConfig(uri=uri))
        rows = pa.concat_tables(source.read(Tar(shard["file"], uri, shard["bytes"])))
        refused = [detail for detail in rows.column("detail").to_pylist() if detail is not None]
        if refused or rows.num_rows != shard["rows"]:
            why = refused[0] if refused else f"has {rows.num_rows} pictures, {FACTS_FILE} says {shard['rows']}"
            raise DataError(f"{uri!r}: {why}")
        ids = pa.array([int(key) for key in rows.column("key").to_pylist()], pa.int64())
        return pa.table({"id": ids, "image": rows.column("image"), "caption": rows.column("caption")})


def open_pictures(field: str, uri: str) -> ParquetPictures | TarPictures:
    """The pictures in a folder; `DataError` or `ConfigError` says why they cannot be judged, before any is read."""
    uri = storage.absolute(uri)
    facts_uri = storage.join(uri, FACTS_FILE)
    facts = storage.read_json(facts_uri) if storage.exists(facts_uri) else {}
    if facts.get("config", {}).get("format") == "folder":
        raise ConfigError(f"{field} = {uri!r}: holds single files; generate with format=parquet or format=webdataset")
    shards = facts.get("shards") or []
    if shards and all(shard["file"].endswith(".tar") for shard in shards):
        return TarPictures(uri, facts)
    try:
        manifest = scan(uri, ("id", "image"))
    except DataError as error:
        raise DataError(f"{field}: {error}") from None
    captions = [name for name in ("prompt", "caption") if name in manifest.columns]
    return ParquetPictures(manifest, captions[0] if captions else None)


def open_records(field: str, uri: str, columns: tuple[str, ...], *, captions: bool) -> ParquetPictures:
    """Records with `columns`; `DataError` where there are none, or `captions` are needed and missing."""
    try:
        manifest = scan(uri, ("id", *columns, *(("caption",) if captions else ())))
    except DataError as error:
        raise DataError(f"{field}: {error}") from None
    return ParquetPictures(manifest, "caption" if "caption" in manifest.columns else None, columns)


@dataclass(frozen=True)
class Unit:
    """Pictures whose features are made and kept together.

    Args:
        number: in the set.
        fragment: of the set.
        rows: numbers of the pictures in that fragment, ascending.
    """

    number: int
    fragment: int
    rows: npt.NDArray[np.int64]


@dataclass(frozen=True)
class PictureSet:
    """The pictures, or other records, of a folder that are judged. Picklable."""

    name: str
    pictures: Pictures
    units: tuple[Unit, ...]

    @property
    def rows(self) -> int:
        return sum(len(unit.rows) for unit in self.units)

    def protocol(self) -> dict[str, Any]:
        """What decides which pictures these are, as JSON values."""
        told = {name: self.pictures.facts[name] for name in _TOLD if name in self.pictures.facts}
        return {
            "uri": self.pictures.uri,
            "identity": self.pictures.identity,
            "available": sum(self.pictures.rows),
            "rows": self.rows,
            "made_by": told,
        }

    def read(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, pa.Table]]:
        """The pictures of some units; a fragment is read once for units of it that follow each other."""
        fragment, table = -1, None
        for unit in units:
            if unit.fragment != fragment:
                fragment, table = unit.fragment, self.pictures.read(unit.fragment)
            assert table is not None
            yield unit, table.take(unit.rows)

    def numbers(self, unit: Unit) -> range:
        """Of the unit's records in the set."""
        start = sum(len(earlier.rows) for earlier in self.units[: unit.number])
        return range(start, start + len(unit.rows))

    def records(self, rows: Sequence[int]) -> dict[int, pa.Table]:
        """The records of some numbers in the set, one row each."""
        starts = np.cumsum([0, *(len(unit.rows) for unit in self.units)])
        found: dict[int, pa.Table] = {}
        wanted = np.sort(np.array(rows, dtype=np.int64))
        for number in np.unique(np.searchsorted(starts, wanted, side="right") - 1):
            ((_, table),) = self.read([self.units[number]])
            for row in wanted[(wanted >= starts[number]) & (wanted < starts[number + 1])]:
                found[int(row)] = table.slice(int(row - starts[number]), 1)
        return found

    def images(self, rows: Sequence[int]) -> dict[int, bytes]:
        """The encoded pictures of some numbers in the set."""
        return {row: table.column("image")[0].as_py() for row, table in self.records(rows).items()}


def choose(name: str, pictures: Pictures, *, limit: int | None, seed: int, row_bytes: int = 0) -> PictureSet:
    """All records, or `limit` of them, every choice as likely as any other.

    Args:
        row_bytes: of a record's decoded pictures, where they are large.
    """
    unit_rows = min(UNIT_ROWS, max(1, UNIT_BYTES // row_bytes)) if row_bytes else UNIT_ROWS
    total = sum(pictures.rows)
    chosen = np.arange(total)
    if limit is not None and limit < total:
        chosen = np.sort(np.random.default_rng(seed).choice(total, limit, replace=False))
    units: list[Unit] = []
    first = 0
    for fragment, rows in enumerate(pictures.rows):
        start, stop = np.searchsorted(chosen, [first, first + rows])
        wanted = chosen[start:stop] - first
        units += [
            Unit(len(units) + index, fragment, wanted[begin : begin + unit_rows])
            for index, begin in enumerate(range(0, len(wanted), unit_rows))
        ]
        first += rows
    return PictureSet(name, pictures, tuple(units))
