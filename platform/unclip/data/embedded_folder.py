"""A folder of records that gets embeddings beside them, unit by unit and shard by shard, in whatever order they come.

A unit is some rows of a row group of the source. Its embeddings are a part; a shard whose parts are all there is written
under its source's name, then its statistics and, last, its receipt. Each file appears whole or not at all, and its bytes
follow from the source and the embeddings alone: what was interrupted is continued by making what is not there.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from unclip.data.batches import Batch
from unclip.data.embedding import EmbeddingStatistics
from unclip.data.ingest.shards import records_sha256, write_tables
from unclip.data.manifest import FACTS_FILE, DataError, Manifest, Slice, read_slices
from unclip.data.pca import PCA_FILE, PrincipalComponents
from unclip.utils import storage

COLUMNS = ("image_embed", "text_embed", "text_states")
"""What embedding adds; columns of these names in the source belong to another CLIP and are left out."""
UNIT_ROWS = 256
"""Rows of a unit: as pictures of 224 pixels 39 MB."""
ROW_GROUP_BYTES = 256 * 2**20
"""Row groups that text states make larger than this are divided."""
_FILES_OF_SOURCE = ("files", "quarantine")
"""Facts of a source's manifest about files that are not copied."""
_WORK = "_parts"
_IDENTITY = "identity.json"
_THREADS = 32


@dataclass(frozen=True)
class EmbeddedFolder:
    """The records of `source`, with embeddings, at `uri`. Picklable.

    Args:
        source: the records.
        uri: where they go; absolute.
        identity: what decides the content, as JSON values; goes into the manifest as `embedding`.
    """

    source: Manifest
    uri: str
    identity: dict[str, Any]

    @cached_property
    def shards(self) -> dict[str, list[int]]:
        """The fragments of each file of the source, both in order."""
        found: dict[str, list[int]] = {}
        for index, fragment in enumerate(self.source.fragments):
            found.setdefault(fragment.file, []).append(index)
        return found

    def units(self, fragment: int) -> list[Slice]:
        rows = self.source.fragments[fragment].rows
        return [(fragment, start, min(start + UNIT_ROWS, rows)) for start in range(0, rows, UNIT_ROWS)]

    def parts(self, fragment: int) -> set[str]:
        """Names of the parts of a row group."""
        return {part_name(unit) for unit in self.units(fragment)}

    def is_complete(self) -> bool:
        """Whether all is there already; `DataError` where the folder holds anything but a beginning of the same."""
        if storage.exists(storage.join(self.uri, FACTS_FILE)):
            self._check_same(storage.read_json(storage.join(self.uri, FACTS_FILE)).get("embedding"))
            return True
        begun = self._work(_IDENTITY)
        self._check_same(storage.read_json(begun) if storage.exists(begun) else None)
        return False

    def _check_same(self, found: Mapping[str, Any] | None) -> None:
        if found is None:
            if set(storage.names(self.uri)) - {_WORK}:
                raise DataError(f"out = {self.uri!r}: holds files that this job did not make; choose an empty folder")
            return
        changed = [name for name, value in self.identity.items() if found.get(name) != value]
        if changed:
            name = changed[0]
            raise DataError(
                f"out = {self.uri!r}: was begun with {name} = {found.get(name)!r}, now it is {self.identity[name]!r}; "
                "choose another folder, or delete this one"
            )

    def begin(self) -> set[str]:
        """Marks the folder as this one's, and names the parts and receipts that are there already."""
        if not storage.exists(self._work(_IDENTITY)):
            storage.write_json(self._work(_IDENTITY), self.identity)
        return set(storage.names(self._work()))

    def write_shard(self, file: str) -> None:
        """Writes a shard from its parts; they are no longer needed then.

        Raises `DataError` where the source's rows are not those that were embedded.
        """
        tables = self._row_groups(file)
        first = next(tables)  # a file of the manifest has rows
        statistics = EmbeddingStatistics(first.schema.field("image_embed").type.list_size)

        def seen(table: pa.Table) -> pa.Table:
            statistics.update(_vectors(table))
            return table

        receipt = write_tables(storage.join(self.uri, file), first.schema, map(seen, chain([first], tables)))
        storage.write_bytes(self._work(f"{file}.statistics"), statistics.to_bytes())
        storage.write_json(self._work(self.receipt_name(file)), receipt)
        for part in sorted(set().union(*map(self.parts, self.shards[file]))):
            storage.remove(self._work(part))

    def _row_groups(self, file: str) -> Iterator[pa.Table]:
        """The source's row groups with their embeddings, divided where they have become too large."""
        kept = [name for name in self.source.columns if name not in COLUMNS]
        for fragment in self.shards[file]:
            rows = self.source.fragments[fragment].rows
            records = read_slices(self.source, [(fragment, 0, rows)], kept)
            pending: list[pa.Table] = []
            for unit in self.units(fragment):
                pending.append(self._joined(records.slice(unit[1], unit[2] - unit[1]), unit))
                if sum(table.nbytes for table in pending) > ROW_GROUP_BYTES:
                    yield pa.concat_tables(pending)
                    pending = []
            if pending:
                yield pa.concat_tables(pending)

    def _joined(self, records: pa.Table, unit: Slice) -> pa.Table:
        with storage.local_file(self._work(part_name(unit))) as path:
            part = pq.read_table(path)
        if not part.column("id").equals(records.column("id")):
            raise DataError(
                f"{posixpath.join(self.source.uri, self.source.fragments[unit[0]].file)!r} changed while it was embedded"
            )
        for name in part.column_names[1:]:
            records = records.append_column(name, part.column(name))
        return records

    def receipt_name(self, file: str) -> str:
        return f"{file}.json"

    def _receipts(self) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(_THREADS) as threads:
            return list(threads.map(lambda file: storage.read_json(self._work(self.receipt_name(file))), self.shards))

    def statistics(self, files: Sequence[str]) -> EmbeddingStatistics:
        """Of the image embeddings of these shards, merged in this order."""
        first, *others = (
            EmbeddingStatistics.from_bytes(storage.read_bytes(self._work(f"{f}.statistics"))) for f in files
        )
        for other in others:
            first.merge(other)
        return first

    def finish(self, clip: Mapping[str, Any], statistics: EmbeddingStatistics) -> dict[str, Any]:
        """Writes the principal components, and the manifest: the mark of a complete folder.

        That has the source's facts, the shards, what `clip` says of the CLIP (at least its `fingerprint`) and what a
        normaliser needs: mean and deviation of z_i, and `scale`, the factor that takes unit norm to the paper's scale.

        Raises `DataError` where the shards do not have the source's rows.
        """
        from unclip.models.normalizer import paper_scale  # here: tasks that write shards do without torch

        shards = self._receipts()
        rows = sum(shard["rows"] for shard in shards)
        if rows != self.source.rows:
            raise DataError(f"{self.uri!r} has {rows} rows for {self.source.rows} in {self.source.uri!r}")
        basis = PrincipalComponents.fit(statistics, clip=clip["fingerprint"])
        basis.save(storage.join(self.uri, PCA_FILE))
        scale = 1 / np.asarray(paper_scale(basis.embed_dim).std)
        manifest = {name: fact for name, fact in self.source.facts.items() if name not in _FILES_OF_SOURCE} | {
            "rows": rows,
            "shards": shards,
            "columns": self._schema(shards[0]["file"]),
            "records_sha256": records_sha256(shards),
            "embedding": self.identity,
            "clip": dict(clip),
            "statistics": {
                "count": statistics.count,
                "mean": statistics.mean.tolist(),
                "std": statistics.std.tolist(),
                "scale": float(scale),
            },
            "pca": {
                "file": PCA_FILE,
                "components": basis.num_components,
                "components_for_1_percent_error": basis.components_for(0.01),
            },
        }
        storage.write_json(storage.join(self.uri, FACTS_FILE), manifest)
        return manifest

    def clean(self) -> None:
        """Removes what was only needed on the way, and what a killed writer left half done."""
        storage.remove(self._work())
        for name in storage.names(self.uri):
            if name.endswith(".tmp"):
                storage.remove(storage.join(self.uri, name))

    def _schema(self, file: str) -> dict[str, str]:
        fs, path = storage.filesystem(storage.join(self.uri, file))
        with fs.open(path, "rb") as shard:
            schema = pq.read_schema(shard)
        return {field.name: str(field.type) for field in schema}

    def _work(self, *name: str) -> str:
        return storage.join(self.uri, _WORK, *name)


def part_name(unit: Slice) -> str:
    """Name of a unit's part."""
    return f"{unit[0]:09d}.{unit[1]:09d}.parquet"


def write_part(uri: str, unit: Slice, embedded: Batch) -> None:
    """Keeps the embeddings of a unit of the folder at `uri`: `id` (B,) and (B, D) arrays named as `COLUMNS`.

    Without the folder's manifest, which every task would have to be sent: 31 MiB and two seconds for a million row groups.
    """
    columns = {name: _as_column(embedded[name]) for name in COLUMNS if name in embedded}
    table = pa.table({"id": pa.array(embedded["id"])} | columns)
    write_tables(storage.join(uri, _WORK, part_name(unit)), table.schema, [table])


def _as_column(vectors: npt.NDArray[np.float16]) -> pa.Array:
    """(B, D) float16 -> fixed-size lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])


def _vectors(table: pa.Table) -> npt.NDArray[np.float16]:
    column = table.column("image_embed").combine_chunks()
    values: npt.NDArray[np.float16] = column.flatten().to_numpy(zero_copy_only=False).reshape(table.num_rows, -1)
    return values
