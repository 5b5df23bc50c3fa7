"""Where pictures go: Parquet, tars that WebDataset readers take, or a file for each size of each picture.

Shards appear whole or not at all, and are written as pictures come: no more than a row group is in memory.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import UnidentifiedImageError

from unclip.data.ingest.shards import write_if_any
from unclip.generation.bulk.receipts import StoredFile, quarantine_name, shard_name
from unclip.generation.bulk.rows import Asked, Refused
from unclip.generation.outputs import read_png_metadata
from unclip.utils import storage

QUARANTINE_FOLDER = "quarantine"
_GROUP_BYTES = 64 * 2**20
_GROUP_ROWS = 1024

SHARD_SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("prompt_id", pa.string()),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("format", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("clip_score", pa.float32()),
        pa.field("parameters", pa.string(), nullable=False),
        pa.field("bundle", pa.string(), nullable=False),
        pa.field("fields", pa.string(), nullable=False),
    ]
)
"""A row a picture, in the order of their ids. `clip_score` is null without a CLIP; `parameters` is JSON of all that changes
a picture beside bundle, prompt and seed; `fields` is JSON of what its row carried along."""

REFUSED_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("prompt_id", pa.string()),
        pa.field("prompt", pa.string()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)
_REPEATED = ["prompt_id", "prompt", "format", "parameters", "bundle", "fields"]  # worth a dictionary
_COMPARED = ["id", "seed", "clip_score"]  # worth their least and greatest values


@dataclass(frozen=True)
class Kept:
    """A picture that is kept: encoded, by its side in pixels; of several sizes where all of them are."""

    asked: Asked
    number: int
    clip_score: float | None
    images: Mapping[int, bytes]

    @property
    def seed(self) -> int:
        return self.asked.seeds[self.number]

    def record(self, encoding: str, bundle: str) -> dict[str, Any]:
        """Its row of a shard."""
        side, image = next(iter(self.images.items()))
        return {
            "id": self.asked.picture_id(self.number),
            "prompt_id": self.asked.prompt_id,
            "prompt": self.asked.prompt,
            "image": image,
            "format": encoding,
            "width": side,
            "height": side,
            "seed": self.seed,
            "clip_score": self.clip_score,
            "parameters": self.asked.parameters,
            "bundle": bundle,
            "fields": self.asked.fields,
        }


class PictureWriter(ABC):
    """Takes the pictures of a unit in the order of their ids."""

    def missing(self, asked: Asked) -> list[int]:
        """Numbers of the candidates that are not there from an earlier attempt."""
        return list(range(len(asked.seeds)))

    @abstractmethod
    def add(self, kept: Kept) -> None:
        """Writes one."""

    @abstractmethod
    def complete(self, asked: Asked) -> None:
        """Takes note that all pictures of a row are there."""

    @abstractmethod
    def finish(self) -> dict[str, Any]:
        """What a receipt says of them; nothing is added any more."""


class _Shard(PictureWriter):
    """One file at `uri`, which is there once `files` are closed; none where there are no pictures."""

    def __init__(self, uri: str, files: ExitStack, *, encoding: str, bundle: str) -> None:
        self._uri, self._files = uri, files
        self._encoding, self._bundle = encoding, bundle
        self._rows = 0

    @cached_property
    def _path(self) -> Path:
        return self._files.enter_context(storage.local_target(self._uri))

    def add(self, kept: Kept) -> None:
        self._rows += 1
        self._write(kept.record(self._encoding, self._bundle))

    def complete(self, asked: Asked) -> None:
        pass  # a shard holds nothing of rows that are not

    def finish(self) -> dict[str, Any]:
        if not self._rows:
            storage.remove(self._uri)  # of an earlier attempt
            return {}
        row_groups = self._close()
        with self._path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        name, size = self._uri.rpartition("/")[2], self._path.stat().st_size
        return {"shard": StoredFile(file=name, rows=self._rows, bytes=size, sha256=digest, row_groups=row_groups)}

    @abstractmethod
    def _write(self, record: dict[str, Any]) -> None: ...

    @abstractmethod
    def _close(self) -> tuple[int, ...]:
        """Ends the file; the rows of its row groups."""


class _ParquetShard(_Shard):
    def __init__(self, uri: str, files: ExitStack, **origin: str) -> None:
        super().__init__(uri, files, **origin)
        self._held: list[dict[str, Any]] = []
        self._bytes = 0
        self._row_groups: list[int] = []

    @cached_property
    def _writer(self) -> pq.ParquetWriter:
        # Pictures are compressed already, and their least and greatest value says nothing.
        return self._files.enter_context(
            pq.ParquetWriter(
                self._path, SHARD_SCHEMA, compression="none", use_dictionary=_REPEATED, write_statistics=_COMPARED
            )
        )

    def _write(self, record: dict[str, Any]) -> None:
        self._held.append(record)
        self._bytes += len(record["image"])
        if len(self._held) >= _GROUP_ROWS or self._bytes >= _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._held, SHARD_SCHEMA))
        self._row_groups.append(len(self._held))
        self._held, self._bytes = [], 0

    def _close(self) -> tuple[int, ...]:
        if self._held:
            self._flush()
        self._writer.close()
        return tuple(self._row_groups)


class _TarShard(_Shard):
    """KEY.png, KEY.txt with the prompt, and KEY.json with all columns; KEY is the id."""

    @cached_property
    def _tar(self) -> tarfile.TarFile:
        return self._files.enter_context(tarfile.open(self._path, "w", format=tarfile.USTAR_FORMAT))

    def _write(self, record: dict[str, Any]) -> None:
        image = record.pop("image")
        record |= {name: json.loads(record[name]) for name in ("parameters", "fields")}
        contents = {
            self._encoding: image,
            "txt": record["prompt"].encode(),
            "json": json.dumps(record).encode(),
        }
        for suffix, content in contents.items():
            member = tarfile.TarInfo(f"{record['id']:012d}.{suffix}")
            member.size = len(content)
            self._tar.addfile(member, io.BytesIO(content))

    def _close(self) -> tuple[int, ...]:
        self._tar.close()
        return ()


class _PictureFiles(PictureWriter):
    """SIZE/NAME.png for every size, which say themselves how they were made."""

    def __init__(self, out: str, *, bundle: str, sizes: Iterable[int], keeps_all: bool) -> None:
        self._out, self._bundle, self._keeps_all = out, bundle, keeps_all
        self._sizes = tuple(sizes)
        self._files: dict[str, int] = {}
        self._there: dict[str, int] = {}

    def missing(self, asked: Asked) -> list[int]:
        """Where only the best are kept, which those are is not known before all are made again."""
        numbers = super().missing(asked)
        if not self._keeps_all:
            return numbers
        return [number for number in numbers if not self._is_there(asked, number)]

    def add(self, kept: Kept) -> None:
        for size, image in kept.images.items():
            name = picture_name(kept.asked, kept.number, size)
            storage.write_bytes(storage.join(self._out, name), image)
            self._files[name] = len(image)

    def complete(self, asked: Asked) -> None:
        if self._keeps_all:
            for name in chain.from_iterable(self._names(asked, number) for number in super().missing(asked)):
                if name not in self._files:
                    self._files[name] = self._there[name]

    def finish(self) -> dict[str, Any]:
        return {"files": dict(sorted(self._files.items()))}

    def _names(self, asked: Asked, number: int) -> list[str]:
        up_to = asked.options.up_to
        return [picture_name(asked, number, size) for size in self._sizes if up_to is None or size <= up_to]

    def _is_there(self, asked: Asked, number: int) -> bool:
        """True where every size is there and was made from this prompt, with this bundle and these settings."""
        expected = png_metadata(asked, number, self._bundle).items()
        for name in self._names(asked, number):
            size = storage.size(storage.join(self._out, name))
            if size is None:
                return False
            self._there[name] = size
            try:
                found = read_png_metadata(storage.join(self._out, name))
            except (FileNotFoundError, UnidentifiedImageError):
                return False
            if not expected <= found.items():
                return False
        return True


def picture_name(asked: Asked, number: int, size: int) -> str:
    """Of a picture under OUT in format folder, the same on every run."""
    return f"{size}/{asked.row:05d}-{asked.seeds[number]}.png"


def png_metadata(asked: Asked, number: int, bundle: str) -> dict[str, str]:
    """What a picture of format folder says of itself."""
    of_caller = {} if asked.prompt_id is None else {"prompt_id": asked.prompt_id}
    origin = {"id": str(asked.picture_id(number)), "prompt": asked.prompt, "seed": str(asked.seeds[number])}
    return origin | of_caller | {"bundle": bundle, "settings": asked.parameters, "fields": asked.fields}


@contextmanager
def open_shard(out: str, unit: int, *, form: str, encoding: str, bundle: str) -> Iterator[PictureWriter]:
    """The shard of a unit; it is there when the block ends without an error, after `finish`."""
    kind, suffix = (_ParquetShard, "parquet") if form == "parquet" else (_TarShard, "tar")
    with ExitStack() as files:
        yield kind(storage.join(out, shard_name(unit, suffix)), files, encoding=encoding, bundle=bundle)


def picture_files(out: str, *, bundle: str, sizes: Iterable[int], keeps_all: bool) -> PictureWriter:
    """The files of format folder.

    Args:
        keeps_all: whether every picture that is made is kept; then those that are there already are not made again.
    """
    return _PictureFiles(out, bundle=bundle, sizes=sizes, keeps_all=keeps_all)


def write_quarantine(out: str, unit: int, refused: Iterable[Refused]) -> StoredFile | None:
    """The rows of a unit without pictures; no file and None where there are none."""
    uri = storage.join(out, QUARANTINE_FOLDER, quarantine_name(unit))
    rows = [asdict(row) for row in sorted(refused, key=lambda row: row.row)]
    tables = [pa.Table.from_pylist(rows, REFUSED_SCHEMA)] if rows else []
    entry = write_if_any(uri, REFUSED_SCHEMA, tables)
    if entry is None:
        storage.remove(uri)  # of an earlier attempt
    return None if entry is None else StoredFile.from_dict(entry)
