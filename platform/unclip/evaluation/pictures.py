"""Sets of pictures with captions that can be judged: records, and what jobs/generate.py wrote; read in units.

A unit is a few pictures of one row group or tar. Which pictures it has follows from the set, `limit` and `seed` alone, so
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
"""Pictures of a unit at most: at 224 pixels 39 MB."""
_TOLD = ("bundle", "prompts", "config", "counts", "records_sha256")
"""What a folder's manifest says of how its pictures came about: it belongs to the protocol."""


class Pictures(Protocol):
    """A folder of pictures. Picklable."""

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
        """`id` int64, `image` (encoded) and `caption` (may be null) of a fragment, in order.

        Raises `DataError` where it does not hold what it held.
        """
        ...


@dataclass(frozen=True)
class ParquetPictures:
    """Records, or shards of a generation job in format parquet.

    Args:
        manifest: where they are.
        caption_column: of a generation job `prompt`; None where nothing is said of the pictures.
    """

    manifest: Manifest
    caption_column: str | None

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
        columns = ["id", "image", *([self.caption_column] if self.caption_column else [])]
        table = read_slices(self.manifest, [(fragment, 0, self.manifest.fragments[fragment].rows)], columns)
        if self.caption_column is None:
            table = table.append_column("caption", pa.nulls(table.num_rows, pa.string()))
        return table.rename_columns(["id", "image", "caption"])


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
    """The pictures of a folder that are judged. Picklable."""

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

    def images(self, rows: Sequence[int]) -> dict[int, bytes]:
        """The encoded pictures of some numbers in the set."""
        starts = np.cumsum([0, *(len(unit.rows) for unit in self.units)])
        found: dict[int, bytes] = {}
        wanted = np.sort(np.array(rows, dtype=np.int64))
        for number in np.unique(np.searchsorted(starts, wanted, side="right") - 1):
            ((_, table),) = self.read([self.units[number]])
            for row in wanted[(wanted >= starts[number]) & (wanted < starts[number + 1])]:
                found[int(row)] = table.column("image")[int(row - starts[number])].as_py()
        return found


def choose(name: str, pictures: Pictures, *, limit: int | None, seed: int) -> PictureSet:
    """All pictures, or `limit` of them, every choice as likely as any other."""
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
            Unit(len(units) + index, fragment, wanted[begin : begin + UNIT_ROWS])
            for index, begin in enumerate(range(0, len(wanted), UNIT_ROWS))
        ]
        first += rows
    return PictureSet(name, pictures, tuple(units))
