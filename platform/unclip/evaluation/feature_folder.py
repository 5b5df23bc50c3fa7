"""What networks made of a set of records, kept: a file a unit, and a manifest once all are there.

Each file appears whole or not at all, and what is in it follows from the records and the networks alone: what was
interrupted is continued by making the files that are not there. A complete folder can be the reference of other evaluations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from unclip.data.batches import Batch
from unclip.data.ingest.shards import write_tables
from unclip.data.manifest import FACTS_FILE, DataError, read_slices, scan
from unclip.evaluation.pictures import PictureSet, Unit
from unclip.utils import storage

_KIND = "features"


@dataclass(frozen=True)
class Features:
    """What was gathered of a set: N records in their order.

    Args:
        ids: (N,) int64.
        captions: N texts, None where there is none.
        columns: by their names (N, D) float32, (N,) floats, or (N,) objects: bytes or None.
    """

    ids: npt.NDArray[np.int64]
    captions: list[str | None]
    columns: Mapping[str, npt.NDArray[Any]]


def features_table(ids: npt.NDArray[np.int64], captions: Sequence[str | None], columns: Batch) -> pa.Table:
    """What a folder keeps of B records: `columns` as `Network.extract` makes them."""
    arrays = {name: _stored(array) for name, array in columns.items()}
    return pa.table({"id": pa.array(ids), "caption": pa.array(captions, pa.string())} | arrays)


@dataclass(frozen=True)
class FeatureFolder:
    """The features at `uri`. Picklable."""

    uri: str

    def missing(self, units: Iterable[Unit]) -> list[Unit]:
        """Those of which there is no file."""
        there = set(storage.names(self.uri))
        return [unit for unit in units if _file(unit.number) not in there]

    def write(self, number: int, table: pa.Table) -> None:
        """Keeps the `features_table` of a unit. Raises `DataError` naming the first record with a number not finite."""
        for name in table.column_names[2:]:
            values = _loaded(table.column(name))
            if values.dtype == object:
                continue
            is_finite = np.isfinite(values.reshape(len(values), -1)).all(axis=1)
            if not is_finite.all():
                record = table.column("id")[int(is_finite.argmin())]
                raise DataError(f"{self.uri!r}: record {record}: its features {name!r} are not finite")
        write_tables(storage.join(self.uri, _file(number)), table.schema, [table])

    def finish(self, pictures: PictureSet, protocol: Mapping[str, Any]) -> None:
        """Writes the manifest: the mark of a complete folder."""
        sizes = storage.sizes(self.uri)
        shards = [
            {"file": name, "rows": len(unit.rows), "bytes": sizes[name], "row_groups": [len(unit.rows)]}
            for unit in pictures.units
            for name in [_file(unit.number)]
        ]
        for name in sizes.keys() - {shard["file"] for shard in shards}:  # what a killed writer left half done
            storage.remove(storage.join(self.uri, name))
        manifest = {"kind": _KIND, "rows": pictures.rows, "protocol": dict(protocol), "shards": shards}
        storage.write_json(storage.join(self.uri, FACTS_FILE), manifest)

    def protocol(self) -> dict[str, Any] | None:
        """What the manifest says of how the features came about; None where the folder is none of complete features."""
        uri = storage.join(self.uri, FACTS_FILE)
        facts = storage.read_json(uri) if storage.exists(uri) else {}
        return dict(facts["protocol"]) if facts.get("kind") == _KIND else None

    def read(self, columns: Sequence[str]) -> Features:
        """All of them, in order; `DataError` where the files are not those that the manifest lists."""
        manifest = scan(self.uri, ("id", "caption", *columns))
        slices = [(index, 0, fragment.rows) for index, fragment in enumerate(manifest.fragments)]
        table = read_slices(manifest, slices, ("id", "caption", *columns))
        return Features(
            ids=table.column("id").to_numpy(),
            captions=table.column("caption").to_pylist(),
            columns={name: _loaded(table.column(name)) for name in columns},
        )


def _file(number: int) -> str:
    return f"features-{number:06d}.parquet"


def _stored(array: npt.NDArray[Any]) -> pa.Array:
    if array.dtype == object:
        return pa.array(array.tolist(), pa.binary())
    if array.ndim == 1:
        return pa.array(array)
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])


def _loaded(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    array = column.combine_chunks()
    if pa.types.is_fixed_size_list(array.type):
        vectors: npt.NDArray[np.float32] = array.flatten().to_numpy().reshape(len(array), -1)
        return vectors
    values: npt.NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return values
