"""Tars of pictures with captions beside them, as img2dataset and webdataset write them."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from unclip.data.sources.base import (
    PICTURE_SUFFIXES,
    FieldSettings,
    Part,
    Row,
    StorageFile,
    is_utf8,
    printable,
    read_text,
    to_tables,
    unsafe_name,
)
from unclip.data.sources.listing import find_shards
from unclip.data.sources.tar import BrokenArchive, Member, TarStream

_SHOWN_SUFFIXES = 8
_GZIP_MAGIC = b"\x1f\x8b"


class WebDatasetSourceConfig(FieldSettings):
    """Tars, plain or gzipped. Consecutive members whose names agree up to the first dot after the folder are a row.

    `.jpg`, `.jpeg`, `.png`, `.webp`, `.gif`, `.bmp`, `.tif`, `.tiff`, `.avif` are its picture, `.txt` its caption,
    `.json` an object with its further fields and, where there is no `.txt`, its caption as `caption`. Other members
    are passed over.
    """

    kind: Literal["webdataset"] = "webdataset"
    max_member_bytes: int = Field(1 << 26, gt=0)
    """Members of more bytes are not read; their rows have the reason `too_large`."""

    def build(self) -> WebDatasetSource:
        return WebDatasetSource(self)


@dataclass(frozen=True)
class Tar(Part):
    """One archive; its size tells when it has changed in place."""

    uri: str
    size: int


@dataclass
class _Sample:
    """The members of one key so far: content by what it is (`image`, `txt`, `json`), and what is wrong first."""

    key: str
    content: dict[str, bytes] = field(default_factory=dict)
    suffixes: list[str] = field(default_factory=list)
    reason: str | None = None
    detail: str | None = None

    def refuse(self, reason: str, detail: str) -> None:
        if self.reason is None:
            self.reason, self.detail = reason, printable(detail)


class WebDatasetSource:
    """A part is a tar."""

    def __init__(self, config: WebDatasetSourceConfig) -> None:
        self._config = config

    def schema(self) -> pa.Schema:
        return self._config.table_schema()

    def parts(self) -> tuple[Tar, ...]:
        files = find_shards(self._config.uri, (".tar", ".tar.gz", ".tgz"))
        return tuple(Tar(file.name, file.uri, file.size) for file in files)

    def read(self, part: Tar) -> Iterator[pa.Table]:
        with StorageFile(part.uri) as file:
            yield from to_tables(self._rows(part, file), self.schema())

    def _rows(self, part: Tar, file: StorageFile) -> Iterator[Row]:
        seen: set[str] = set()
        rows = 0
        try:
            for sample in self._samples(file):
                if sample.key in seen:
                    sample.refuse("repeated_key", f"members of {sample.key!r} came before, with others in between")
                seen.add(sample.key)
                rows += 1
                yield self._row(sample)
        except (BrokenArchive, EOFError, OSError, zlib.error) as error:
            if file.failed:
                raise
            reason = "truncated_shard" if isinstance(error, EOFError) else "unreadable_shard"
            reason = error.reason if isinstance(error, BrokenArchive) else reason
            yield Row(
                part.name, reason=reason, detail=f"{error}; {rows} rows before are whole, what follows is unknown"
            )

    def _samples(self, file: StorageFile) -> Iterator[_Sample]:
        """The rows of the archive. One that the archive breaks off in or after may be incomplete: it is not among them."""
        archive = TarStream(_decompressed(file))
        sample: _Sample | None = None
        for member in archive:
            if member.is_folder:
                continue
            key, suffix = _split(member.name)
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample = _Sample(key)
            self._add(sample, member, suffix, archive)
        if sample is not None:
            yield sample

    def _add(self, sample: _Sample, member: Member, suffix: str, archive: TarStream) -> None:
        name = _relative(member.name)
        if len(sample.suffixes) < _SHOWN_SUFFIXES:
            sample.suffixes.append(suffix)
        slot = "image" if suffix in PICTURE_SUFFIXES else suffix
        if unsafe := unsafe_name(name):
            sample.refuse("bad_member_name", f"{name!r} {unsafe}")
        elif not suffix:
            sample.refuse("bad_member_name", f"{name!r} has no key and suffix")
        elif member.problem is not None:
            sample.refuse("bad_member", f"{name!r} {member.problem}")
        elif slot not in ("image", "txt", "json"):
            return
        elif slot in sample.content:
            sample.refuse("duplicate_member", f"{name!r} is one more of its kind in its row")
        elif member.size > self._config.max_member_bytes:
            sample.refuse("too_large", f"{name!r} has {member.size} bytes, more than {self._config.max_member_bytes}")
        else:
            sample.content[slot] = archive.read()

    def _row(self, sample: _Sample) -> Row:
        texts = {}
        for slot in sample.content.keys() & {"txt", "json"}:
            texts[slot], valid = read_text(sample.content[slot])
            if not valid:
                sample.refuse("invalid_utf8", f"'{sample.key}.{slot}' is not UTF-8")
        record = self._sidecar(sample, texts.get("json"))
        caption = texts.get("txt", record.get("caption"))
        if caption is not None and not isinstance(caption, str):
            sample.refuse("bad_sidecar", f"caption in '{sample.key}.json' is no text")
            caption = None
        if caption is not None and not is_utf8(caption):
            sample.refuse("invalid_utf8", f"caption in '{sample.key}.json' has lone surrogates")
        if "image" not in sample.content:
            sample.refuse("no_image", f"no picture among the members {', '.join(sample.suffixes)}")
        carried = self._config.carried(record, texts["json"]) if record else {}
        caption = None if caption is None else printable(caption)
        return Row(printable(sample.key), sample.content.get("image"), caption, sample.reason, sample.detail, carried)

    def _sidecar(self, sample: _Sample, text: str | None) -> dict[str, Any]:
        """The JSON object beside the picture; empty where there is none."""
        if text is None:
            return {}
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            sample.refuse("bad_sidecar", f"'{sample.key}.json' is not JSON: {error}")
            return {}
        if not isinstance(record, dict):
            sample.refuse("bad_sidecar", f"'{sample.key}.json' is no JSON object")
            return {}
        return record


def _decompressed(file: StorageFile) -> Any:
    magic = file.read(len(_GZIP_MAGIC))
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if magic == _GZIP_MAGIC else file


def _relative(name: str) -> str:
    return name.removeprefix("./")


def _split(name: str) -> tuple[str, str]:
    """Key and suffix of a member: cut at the first dot after the folder. A name without both is a key of its own."""
    folder, slash, base = _relative(name).rpartition("/")
    stem, _, suffix = base.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem and suffix else (_relative(name), "")
